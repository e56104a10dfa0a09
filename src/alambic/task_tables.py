"""The tables of a task file, key by key: types, defaults, and the sentences that editors and the reference show."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from alambic.kinds import writing
from alambic.kinds.classify import DEFAULT_CANDIDATES, DISTILLED

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
LongMode = Literal["windows", "head", "head_tail", "error", "leave_out"]
MOST_GUESSES = 32  # tokens guessed at once; each costs a computation where it is wrong
Prefer = Literal["quality", "p95_ms", "mean_ms", "size_mb", "j_per_request"]


class Spec(BaseModel):
    """A table: unknown keys are errors, values stay as they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSpec(Spec):
    """What the task is."""

    name: Name = Field(description="Short name: letters, digits, dot, dash, underscore. Names the run folder.")
    kind: Literal["classify", "generate", "chat", "extract"] = Field(description="What goes in and what comes out.")
    description: str = Field("", description="One sentence on the task, copied to the model card.")
    multi_label: bool = Field(False, description="True when a text may carry several labels, or none.")
    seed: int = Field(0, ge=0, description="Seed of every random choice. 0 is a seed.")
    threads: int | None = Field(None, ge=1, description="Threads used to train and measure; all cores when absent.")


class DataSpec(Spec):
    """Where the examples are and how to read them."""

    train: str = Field(
        description="File (csv, tsv, jsonl, parquet), folder of .txt files per label, or (kinds that write) of train, "
        "valid and test files."
    )
    dev: str | None = Field(None, description="Rows that decide. Taken from train when absent.")
    test: str | None = Field(None, description="Rows scored once, at the end. Set aside from train when absent.")
    text: str | None = Field(None, description="Name of the text column; guessed and printed when absent.")
    label: str | None = Field(None, description="Name of the label column; guessed and printed when absent.")
    group: str | None = Field(None, description="Column whose equal values never fall on both sides of a split.")
    long: LongMode = Field(
        "windows",
        description="What to do with a text longer than the model reads. Kinds that write: error (the default there) "
        "or leave_out.",
    )
    output: str | None = Field(
        None, description="Name of the column of answers (kinds that write); guessed when absent."
    )
    prompt: str | None = Field(None, description="How the user message is written; {column} stands for a column.")
    system: str | None = Field(None, description="System message of every conversation that brings none.")
    encoding: str | None = Field(None, description="Character encoding; detected when absent.")
    separator: str | None = Field(None, min_length=1, max_length=1, description="CSV separator; detected when absent.")
    label_separator: str | None = Field(None, min_length=1, description="Between labels of one row (multi_label).")
    licence: str | None = Field(None, description="Licence of the data (SPDX name), copied to the model card.")
    out_of_scope: str | None = Field(
        None, description="classify: file of texts that no label fits, or the label that such rows have."
    )
    unlabelled: str | None = Field(
        None, description="classify: file of texts without labels (one a line, or a table) that a distilled candidate "
        "learns from besides the rows.",
    )  # fmt: skip
    reasons: Literal["rows", "texts"] | None = Field(
        None,
        description="classify: keep an index of the training rows, so that `--why` shows the nearest ones: their "
        "places and digests (rows), or their texts too (texts). Nothing is kept when absent.",
    )
    test_share: float = Field(0.15, gt=0.0, lt=0.9, description="Share of train set aside as test when none is given.")


class BaseSpec(Spec):
    """The model that candidates start from."""

    name: str = Field(
        "auto",
        description="A name of `alambic bases`, a local folder, a hub id, (kinds that write) scratch, a new one, or "
        "(classify) auto: by the language of the texts.",
    )
    parameters: int | None = Field(None, ge=10_000, description="scratch: about how many weights it has.")
    shape: Literal["decoder", "encoder-decoder"] | None = Field(None, description="scratch: what is made.")
    revision: str | None = Field(None, description="Commit or tag on the hub.")
    max_tokens: int | None = Field(None, ge=8, description="Tokens read at once; the base's own limit when absent.")


class Budget(Spec):
    """What the bundle must meet. Absent limits do not bind."""

    quality: dict[str, float] = Field(default_factory=dict, description="Floors by metric, as shares (0.9 is 90 %).")
    precision: float | None = Field(
        None, gt=0, lt=1,
        description="classify: share of the answers given that must be right, at 95 % confidence; the bundle abstains "
        "from the others.",
    )  # fmt: skip
    coverage: float | None = Field(
        None, gt=0, lt=1, description="classify: share of texts whose true label must be in the label set given."
    )
    in_scope: float | None = Field(
        None, gt=0, lt=1,
        description="classify: share of the task's own texts that must not be taken for out of scope (0.98 where "
        "`data.out_of_scope` is given).",
    )  # fmt: skip
    p95_ms: float | None = Field(None, gt=0, description="95th percentile of the time of one text, in milliseconds.")
    mean_ms: float | None = Field(
        None, gt=0, description="classify: mean time of one text, in milliseconds (a cascade lowers it, not p95)."
    )
    size_mb: float | None = Field(None, gt=0, description="Size of the whole bundle, in 10^6 bytes.")
    peak_ram_mb: float | None = Field(None, gt=0, description="Peak memory of a predicting process, in 10^6 bytes.")
    j_per_request: float | None = Field(None, gt=0, description="Energy of one text, in joules.")
    build_minutes: float | None = Field(None, gt=0, description="Wall time that the build may take.")
    prefer: Prefer | None = Field(None, description="Decides among those that meet every limit.")
    give_up: float = Field(0.0, ge=0, description="Points of quality that may be given up for `prefer` when tied.")

    @field_validator("quality")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        for metric, floor in value.items():
            if not 0.0 <= floor <= 1.0:
                raise ValueError(f"{metric} = {floor:g} is not a share between 0 and 1 (write 0.9 for 90 %)")
        return value


class AnswerSpec(Spec):
    """How answers are written (kinds that write); what is measured is what ships."""

    max_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer; from the data when absent.")
    temperature: float = Field(0.0, ge=0, le=2, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Smallest set of tokens with this share of the probability.")
    repetition_penalty: float = Field(1.0, gt=0, description="1 is none.")
    stop: tuple[str, ...] = Field((), description="Texts that end an answer.")
    json_schema: str | None = Field(None, alias="schema", description="extract: file of the JSON Schema of an answer.")
    arithmetic: Literal["auto", "f32", "bf16"] = Field(
        "auto",
        description="Of 8-bit and 4-bit models on a CPU with bf16, which reads prompts faster in bf16 and writes "
        "faster in f32. auto measures, and keeps bf16 where it is surely faster.",
    )
    lookup: bool | int | Literal["auto"] = Field(
        False,
        description="Guess tokens from the prompt and check them together (answers that copy): true, how many at once, "
        "or auto, which measures and keeps what is faster.",
    )
    draft: str | None = Field(
        None, description="Smaller bundle with the same tokens, whose guesses are checked; kept where it is faster."
    )

    @field_validator("lookup", mode="before")
    @classmethod
    def _guesses(cls, value: object) -> object:
        if isinstance(value, bool) or value == "auto" or (isinstance(value, int) and 1 <= value <= MOST_GUESSES):
            return value
        raise ValueError(f"got {value!r}; allowed: true, false, 'auto', or 1 to {MOST_GUESSES} tokens")


class PreferencesSpec(Spec):
    """Pairs of a better and a worse answer, learnt from after the fine-tuning (DPO; generate and chat)."""

    file: str = Field(
        description="File of pairs (jsonl, csv, parquet), in TRL's forms: prompt, chosen, rejected; chosen, rejected; "
        "prompt, completion and a label or a score."
    )
    dev: str | None = Field(None, description="Pairs that decide when to stop. Taken from `file` when absent.")
    beta: float = Field(0.1, gt=0, description="How near to the fine-tuned model the new one stays: larger is nearer.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of the pairs that are the wrong way round.")
    epochs: float = Field(2.0, gt=0, description="Passes over the pairs at most; dev stops earlier.")
    learning_rate: float | None = Field(None, gt=0, description="Peak; by the size of the model when absent.")
    method: Literal["auto", "full", "lora", "dora", "qlora"] = Field("auto", description="As in a recipe of finetune.")
    rank: int = Field(16, ge=1, description="Width of the adapter (lora, dora, qlora).")
    batch_size: int = Field(16, ge=1, description="Pairs a step.")


class RemoteStageSpec(Spec):
    """A model behind an address, asked last and only where whoever uses the bundle says so (classify)."""

    api: Literal["openai", "anthropic"] = Field(description="How it is spoken to; openai: every compatible server.")
    url: str = Field(description="Base address, for example https://api.anthropic.com or http://127.0.0.1:8080/v1.")
    model: str = Field(min_length=1, description="Name that the endpoint knows.")
    key_env: str | None = Field(None, description="Environment variable that holds the key; none is sent when absent.")
    instructions: str = Field("", description="Sentences for it, after the description of the task and the labels.")
    examples: int = Field(
        0, ge=0, le=50, description='Training rows nearest to the text that it is shown; needs data.reasons = "texts".'
    )
    usd_per_million_in: float | None = Field(None, ge=0, description="Price of the tokens it reads; both or neither.")
    usd_per_million_out: float | None = Field(None, ge=0, description="Price of the tokens it writes.")
    sampling: bool = Field(True, description="Send a temperature of 0; false for models that refuse one.")
    timeout_s: float = Field(60.0, gt=0, description="Longest silence of an answer.")


class CandidateSpec(Spec):
    """One model to try; `recipe` overrides the defaults of its step."""

    name: str = Field(
        description="A name of the ladder, or with `step` any. classify: "
        + ", ".join((*DEFAULT_CANDIDATES, *DISTILLED))
        + ". generate, chat and extract: "
        + ", ".join(writing.DEFAULT_CANDIDATES["extract"])
        + " (tagger: extract only); with [preferences] also "
        + ", ".join(writing.PREFERRED)
        + "."
    )
    step: str | None = Field(
        default=None,
        description="classify: the name of the ladder that makes it, so that one step is tried in several ways.",
    )
    recipe: dict[str, bool | int | float | str] = Field(default_factory=dict, description="Options of its step.")
    chain: tuple[str, ...] | None = Field(
        None,
        description="cascade (or cascade-NAME): other candidates of this task, cheapest first, the full model last; "
        "composed from what was measured when absent.",
    )

    @property
    def made_by(self) -> str:
        """Name of the ladder that makes it."""
        return self.step or self.name
