"""`qnext completion`: a script that teaches a shell the verbs, their flags and their arguments."""

from __future__ import annotations

from typing import Annotated

import typer

_BASH = r"""# Bash completion of qnext. Put into ~/.bashrc:  source <(qnext completion bash)
_qnext() {
    local current=${COMP_WORDS[COMP_CWORD]} line
    [[ $current == = ]] && current=
    local IFS=$'\n'
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W $'@VERBS@' -- "$current"))
        return
    fi
    while IFS= read -r line; do
        case $line in
            '#folders') compopt -o filenames 2>/dev/null; COMPREPLY+=($(compgen -d -- "$current")) ;;
            '#files') compopt -o filenames 2>/dev/null; COMPREPLY+=($(compgen -f -- "$current")) ;;
            *) COMPREPLY+=("${line%%$'\t'*}") ;;
        esac
    done < <("${COMP_WORDS[0]}" completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _qnext qnext
"""

_ZSH = r"""#compdef qnext
# Zsh completion of qnext. Put into ~/.zshrc, after compinit:  source <(qnext completion zsh)
_qnext() {
    local line
    local -a lines found
    lines=("${(@f)$("${words[1]}" completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    for line in $lines; do
        case $line in
            '#folders') _files -/ ;;
            '#files') _files ;;
            ?*) found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}") ;;
        esac
    done
    ((${#found})) && _describe qnext found
}
if [[ $funcstack[1] == _qnext ]]; then _qnext "$@"; else compdef _qnext qnext; fi
"""

_FISH = r"""# Fish completion of qnext. Put into ~/.config/fish/config.fish:  qnext completion fish | source
function __qnext_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    for line in ($before[1] completion words -- $before[2..-1] "$current" 2>/dev/null)
        switch $line
            case '#folders'
                __fish_complete_directories "$current"
            case '#files'
                __fish_complete_path "$current"
            case '*'
                echo $line
        end
    end
end
complete -c qnext -f -a '(__qnext_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def command(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="the shell")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="WORD", hidden=True, help="for the scripts: what was typed so far")
    ] = None,
) -> None:
    """Print a script for the shell, which asks for candidates as you type: `source <(qnext completion bash)`."""
    from qnext.cli import VERBS
    from qnext.errors import UsageError

    if shell == "words":
        from qnext.cli.parsing.complete import candidates

        print("\n".join(candidates(words or [])))
    elif shell not in _SCRIPTS:
        raise UsageError(f"no completion for {shell!r}; there is one for {', '.join(_SCRIPTS)}")
    else:
        verbs = "\\n".join([*VERBS, "--help", "--version"])
        print(_SCRIPTS[shell].replace("@VERBS@", verbs), end="")
