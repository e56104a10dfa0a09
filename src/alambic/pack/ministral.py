"""Export configurations for the kinds that optimum-intel 2.2 does not take with this transformers.

Ministral 3 (`model_type` ministral3) is a Llama whose queries grow with their position beyond the length it was first
trained on; that factor is ordinary arithmetic on `position_ids`, which the tracer follows, so Llama's configuration
serves. Gemma 2 and Marian are refused for later versions of transformers; their configurations still serve. The proof
of each is equal greedy tokens (`alambic.pack.writer_compare`).
"""

from __future__ import annotations

from alambic import _extras

_DECODER = ("text-generation", "text-generation-with-past")
_SEQ2SEQ = ("text2text-generation", "text2text-generation-with-past")
# model_type -> the configuration that serves, and the tasks.
_SERVES = {
    "ministral3": ("LlamaOpenVINOConfig", _DECODER),
    "gemma2": ("Gemma2OpenVINOConfig", _DECODER),
    "marian": ("MarianOpenVINOConfig", _SEQ2SEQ),
}
_LAST_TRANSFORMERS = "5.99"


def register() -> None:
    """Tell optimum-intel how to export them, unless that was done."""
    manager = _extras.load("optimum.exporters.tasks").TasksManager
    configs = _extras.load("optimum.exporters.openvino.model_configs")
    register_as = manager.create_register("openvino", overwrite_existing=True)
    for kind, (name, tasks) in _SERVES.items():
        theirs = getattr(configs, name)
        ours = type(f"Alambic{name}", (theirs,), {"MAX_TRANSFORMERS_VERSION": _LAST_TRANSFORMERS})
        register_as(kind, *tasks, library_name="transformers")(ours)
