"""What a shell completes: the commands, and the settings behind --set.

eval "$(grpo completion bash)"
eval "$(grpo completion zsh)"
"""

import argparse

from grpo.cli import COMMANDS
from grpo.system.parser import Parser

BASH = """_grpo() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [[ "${{COMP_WORDS[*]}}" == *" --set "* && "$word" != -* ]]; then
    compopt -o nospace 2> /dev/null
    COMPREPLY=($(compgen -S = -W "{settings}" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -F _grpo grpo"""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args().shell
    from grpo.config import setting_names

    if shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(BASH.format(commands=" ".join(COMMANDS), settings=" ".join(setting_names())))
