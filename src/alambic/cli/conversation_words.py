"""What `alambic chat` says, in English and French."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The lines of one language; names in braces are filled in."""

    greeting: str
    help: str
    reset: str
    system: str
    no_system: str
    save_where: str
    saved: str
    not_saved: str
    nothing: str
    unknown: str
    stopped: str
    cut: str
    times: str
    error: str


WORDS = {
    "en": Words(
        greeting="{name} answers here; nothing leaves this machine. /help lists the commands, Ctrl-D quits.",
        help=(
            "/reset          forget the conversation\n"
            "/system [TEXT]  show or set the system prompt\n"
            "/save FILE      add the conversation to a JSONL file\n"
            "/quit           leave (or Ctrl-D)\n"
            "Ctrl-C stops an answer. A line that ends in \\ goes on."
        ),
        reset="The conversation starts anew.",
        system="System prompt: {text}",
        no_system="No system prompt of yours; the model has its own, if any.",
        save_where="Where to? /save FILE",
        saved="{count} messages added to {path}",
        not_saved="{path}: not saved: {reason}",
        nothing="There is nothing to save yet.",
        unknown="No command {name}; {known}",
        stopped="[stopped]",
        cut="Cut at the limit of tokens.",
        times="{read} tokens read in {read_time}, {written} written in {write_time}",
        error="error",
    ),
    "fr": Words(
        greeting="{name} répond ici ; rien ne quitte cette machine. /help donne les commandes, Ctrl-D quitte.",
        help=(
            "/reset           oublier la discussion\n"
            "/system [TEXTE]  montrer ou fixer la consigne système\n"
            "/save FICHIER    ajouter la discussion à un fichier JSONL\n"
            "/quit            quitter (ou Ctrl-D)\n"
            "Ctrl-C arrête une réponse. Une ligne finie par \\ se poursuit."
        ),
        reset="La discussion repart de zéro.",
        system="Consigne système : {text}",
        no_system="Pas de consigne de votre part ; le modèle garde la sienne, s'il en a une.",
        save_where="Où ? /save FICHIER",
        saved="{count} messages ajoutés à {path}",
        not_saved="{path} : pas enregistré : {reason}",
        nothing="Il n'y a encore rien à enregistrer.",
        unknown="Pas de commande {name} ; {known}",
        stopped="[arrêté]",
        cut="Coupé à la limite de jetons.",
        times="{read} jetons lus en {read_time}, {written} écrits en {write_time}",
        error="erreur",
    ),
}
