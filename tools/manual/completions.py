"""Completions for bash, zsh and fish, from the programs' tables."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from vtpm_cuse.cli.registry import program_of, programs
from vtpm_cuse.cli.words.table import Kind, TpmTerm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vtpm_cuse.cli.words.table import Option, Program, SubOption

_FILES: Final = {"PATH", "FILE", "DEVICE"}
_DIRS: Final = {"DIR"}
_USERS: Final = {"USER"}
_MADE: Final = '# Made by "python -m tools.manual": change the tables, not this file.\n'


class Value(NamedTuple):
    """What may follow: "words" (*choices*), "keys" (*choices*), or one of those without choices.

    These are "files", "dirs", "users", "tpms" (of the manager's) and "any".
    """

    kind: str
    choices: tuple[str, ...] = ()


class Command(NamedTuple):
    """A name to be typed, and what it runs; *context* is the word that chose a subcommand."""

    name: str
    context: str
    program: Program


def completions() -> dict[str, str]:
    """All files: path below a folder of completions, and text."""
    found = {"bash/vtpm-cuse": _bash(), "zsh/_vtpm_cuse": _zsh()}
    for name in names():
        found[f"fish/{name}.fish"] = _fish(name)
    return found


def names() -> tuple[str, ...]:
    """Every name of a program that is completed."""
    return tuple(dict.fromkeys(command.name for command in _commands()))


def _commands() -> Iterator[Command]:
    for program in programs():
        if " " not in program.name:
            yield Command(program.name, "", program)
            for sub in program.subcommands:
                yield Command(program.name, sub.name, program_of(sub.module))
        for alias in program.aliases:
            if " " not in alias:  # else it is another program's subcommand
                yield Command(alias, "", program)


def _values(option: Option) -> tuple[Value, ...]:
    """What follows an option, one for each word of its value."""
    if option.subs:
        keys = tuple(
            f"{sub.name}=" if sub.metavar else sub.name for sub in option.subs if sub.available
        )
        return (Value("keys", keys),)
    words = option.metavar.split()
    found = [_value(word) for word in words]
    if option.choices:
        found[0] = Value("words", option.choices)
    return tuple(found)


def _value(metavar: str, choices: tuple[str, ...] = ()) -> Value:
    if choices:
        return Value("words", choices)
    for kind, metavars in (("files", _FILES), ("dirs", _DIRS), ("users", _USERS)):
        if metavar in metavars:
            return Value(kind)
    return Value("any")


def _sub_value(sub: SubOption) -> Value:
    if sub.kind is Kind.BOOL:
        return Value("words", ("true", "false"))
    return _value(sub.metavar, sub.choices)


def _operand(program: Program) -> Value:
    if program.subcommands:
        return Value("words", tuple(sub.name for sub in program.subcommands))
    if any(isinstance(term, TpmTerm) for term in program.operands):
        return Value("tpms")
    return next((_value(term.name) for term in program.operands), Value("any"))


# bash

_BASH_HEAD: Final = (
    _MADE
    + r"""# shellcheck shell=bash

_vtpm_cuse() {
    local line=${COMP_LINE:0:COMP_POINT} name=$1 context='' words cur prev prev2 value
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=('')
    cur=${words[-1]} prev=${words[-2]-} prev2=''
    ((${#words[@]} > 3)) && prev2=${words[-3]}
    name=${name##*/}
    if ((${#words[@]} > 2)) && [[ $(_vtpm_cuse_contexts "$name") == *" ${words[1]} "* ]]; then
        context=${words[1]}
    fi
    if [[ $cur == --*=* ]]; then
        prev=${cur%%=*}
        cur=${cur#*=}
    fi
    COMPREPLY=()
    value=$(_vtpm_cuse_value "$name $context $prev")
    if [[ ! $value && $prev != -* && $prev2 == -* ]]; then
        value=$(_vtpm_cuse_value "$name $context $prev2 $prev")
        [[ $value ]] || value=$(_vtpm_cuse_value "$name $context $prev2 +")
    fi
    if [[ ! $value ]]; then
        if [[ $cur == -* ]]; then
            value="words $(_vtpm_cuse_value "$name $context")"
        else
            value=$(_vtpm_cuse_value "$name $context operand")
        fi
    fi
    local done='' rest=$cur
    if [[ $value == keys* ]]; then
        local last=${cur##*,}
        if [[ $last == *=* ]]; then
            value=$(_vtpm_cuse_value "$name $context $prev ${last%%=*}=")
            rest=${last#*=}
        else
            rest=$last
        fi
        done=${cur%"$rest"}
    fi
    case $value in
    files) mapfile -t COMPREPLY < <(compgen -f -- "$rest") ;;
    dirs) mapfile -t COMPREPLY < <(compgen -d -- "$rest") ;;
    users) mapfile -t COMPREPLY < <(compgen -u -- "$rest") ;;
    tpms)
        local tpm
        while read -r tpm; do # compgen would expand what a name has
            [[ $tpm == "$rest"* ]] && COMPREPLY+=("$tpm")
        done < <(vtpm ls --names 2>/dev/null)
        ;;
    words* | keys*) mapfile -t COMPREPLY < <(compgen -W "${value#* }" -- "$rest") ;;
    esac
    [[ $value == files || $value == dirs ]] && compopt -o filenames 2>/dev/null
    [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace 2>/dev/null
    # Readline has split the word at these already, and wants what comes behind the last of them.
    local split=${done%"${done##*[=:]}"}
    COMPREPLY=("${COMPREPLY[@]/#/"${done#"$split"}"}")
}

"""
)


def _bash() -> str:
    rows = []
    for name, context, program in _commands():
        prefix = f"{name} {context}"
        options = " ".join(word for option in program.available for word in option.words)
        rows.append((prefix, options))
        rows.append((f"{prefix} operand", _bash_value(_operand(program))))
        for option in program.available:
            for word in option.words:
                rows += _bash_option(f"{prefix} {word}", option)
    contexts = [
        f"    {name}) echo ' {' '.join(sub.name for sub in program.subcommands)} ' ;;\n"
        for name, context, program in _commands()
        if program.subcommands and not context
    ]
    cases = "".join(f"    '{key}') echo '{value}' ;;\n" for key, value in rows if value)
    return (
        f"{_BASH_HEAD}_vtpm_cuse_contexts() {{\n    case $1 in\n{''.join(contexts)}    esac\n}}\n\n"
        f"_vtpm_cuse_value() {{\n    case $1 in\n{cases}    esac\n}}\n\n"
        f"complete -F _vtpm_cuse {' '.join(names())}\n"
    )


def _bash_option(key: str, option: Option) -> Iterator[tuple[str, str]]:
    values = _values(option)
    if values:
        yield key, _bash_value(values[0])
    if len(values) > 1:
        yield f"{key} +", _bash_value(values[1])
    for sub in option.subs:
        if sub.available:
            yield f"{key} {sub.name}=", _bash_value(_sub_value(sub))


def _bash_value(value: Value) -> str:
    return " ".join((value.kind, *value.choices))


# zsh


_ZSH_TPMS: Final = """\
_vtpm_cuse_tpms() {
    local -a tpms=(${(f)"$(_call_program tpms vtpm ls --names 2>/dev/null)"})
    compadd -a tpms
}

"""


def _zsh() -> str:
    functions, cases, known = [], [], set()
    for name, context, program in _commands():
        function = f"_vtpm_cuse_{re.sub('[^a-z0-9]', '_', program.name)}"
        cases.append(f"    '{name} {context}') {function} ;;\n")
        if function not in known:
            known.add(function)
            functions.append(_zsh_function(function, program))
    tops = " ".join(f"'{name}'" for name, context, _ in _commands() if context)
    return (
        f"#compdef {' '.join(names())}\n{_MADE}\n{_ZSH_TPMS}{''.join(functions)}"
        "_vtpm_cuse() {\n"
        "    local name=${service:t} context=''\n"
        f"    local -a contexts=({tops})\n"
        "    if (( CURRENT > 2 && $contexts[(Ie)$name] )); then\n"
        "        context=$words[2]\n"
        "        shift words\n"
        "        (( CURRENT-- ))\n"
        "    fi\n"
        '    case "$name $context" in\n'
        f"{''.join(cases)}    esac\n}}\n\n"
        '_vtpm_cuse "$@"\n'
    )


def _zsh_function(function: str, program: Program) -> str:
    helpers: list[str] = []
    specs: list[str] = []
    for option in program.available:
        actions = []
        words = option.metavar.split() or ["value"]
        for word, value in zip(words, _values(option), strict=False):
            if value.kind == "keys":
                helper = f"{function}_{re.sub('[^a-z0-9]', '_', option.name)}"
                helpers.append(_zsh_keys(helper, option))
                actions.append(f":{_zsh_text(word)}:{helper}")
            else:
                actions.append(f":{_zsh_text(word)}:{_zsh_action(value)}")
        if option.optional_value:
            actions = [f":{action}" for action in actions]
        specs += _zsh_specs(option, "".join(actions))
    if program.subcommands:
        subs = " ".join(f"{sub.name}\\:{_zsh_blanks(sub.help)}" for sub in program.subcommands)
        specs.append(f"':interface:(({subs}))'")
    elif program.operands:
        specs.append(f"'*:operand:{_zsh_action(_operand(program))}'")
    body = "".join(f"        {spec} \\\n" for spec in specs)
    return (
        f"{''.join(helpers)}{function}() {{\n    _arguments \\\n{body}        && return 0\n}}\n\n"
    )


def _zsh_specs(option: Option, actions: str) -> Iterator[str]:
    forms = option.words
    others = "" if option.repeats else f"({' '.join(forms)})"
    star = "*" if option.repeats else ""
    for form in forms:
        suffix = ""
        if option.takes_value and len(option.metavar.split()) < 2:
            suffix = "=" if form.startswith("--") else ("+" if form == f"-{option.letter}" else "")
        yield f"'{others}{star}{form}{suffix}[{_zsh_text(option.help)}]{actions}'"


def _zsh_keys(helper: str, option: Option) -> str:
    rows = []
    for sub in option.subs:
        if sub.available:
            action = f":{_zsh_text(sub.metavar)}:{_zsh_action(_sub_value(sub))}"
            action = action if sub.metavar else ""
            rows.append(f"        '{sub.name}[{_zsh_text(sub.help)}]{action}' \\\n")
    return f"{helper}() {{\n    _values -s , '{option.noun}' \\\n{''.join(rows)}        && return 0\n}}\n\n"


def _zsh_action(value: Value) -> str:
    plain = {
        "files": "_files",
        "dirs": "_files -/",
        "users": "_users",
        "tpms": "_vtpm_cuse_tpms",
        "any": " ",
    }
    return plain.get(value.kind) or f"({' '.join(value.choices)})"


def _zsh_text(text: str) -> str:
    return re.sub(r"([][:\\])", r"\\\1", text).replace("'", "'\\''")


def _zsh_blanks(text: str) -> str:
    """Text in a list of words, which zsh reads a second time."""
    quoted = re.sub(r"([][:\\ ()|&;<>*?'])", r"\\\1", text)
    return quoted.replace("'", "'\\''")


# fish


def _fish(name: str) -> str:
    commands = [command for command in _commands() if command.name == name]
    top = " -n __fish_use_subcommand" if len(commands) > 1 else ""
    # What several subcommands share is said once: a line, and the words that it holds behind.
    lines: dict[tuple[bool, str], list[str]] = {}
    for _, context, program in commands:
        for line in _fish_lines(program):
            lines.setdefault((bool(context), line), []).append(context)
    text = _MADE
    for (behind, line), contexts in lines.items():
        seen = f" -n '__fish_seen_subcommand_from {' '.join(contexts)}'" if behind else top
        text += f"complete -c {name}{seen}{line}\n"
    return text


def _fish_lines(program: Program) -> Iterator[str]:
    for sub in program.subcommands:
        yield f" -f -a {sub.name} -d {_fish_text(sub.help)}"
    operand = _operand(program)
    if operand.kind == "any":
        yield " -f"
    if operand.kind == "tpms":
        yield " -f -a '(vtpm ls --names 2>/dev/null)'"
    for option in program.available:
        yield f"{_fish_words(option)}{_fish_value(option)} -d {_fish_text(option.help)}"


def _fish_words(option: Option) -> str:
    if option.single_dash:
        return f" -{'s' if len(option.name) == 1 else 'o'} {option.name}"
    letter = f" -s {option.letter}" if option.letter else ""
    return f"{letter} -l {option.name}"


def _fish_value(option: Option) -> str:
    values = _values(option)
    if not values:
        return " -f"
    needed = "-f" if option.optional_value else "-x"
    kind, choices = values[0]
    if kind == "files":
        return " -r -F"
    arguments = {
        "dirs": "(__fish_complete_directories)",
        "users": "(__fish_complete_users)",
        "words": " ".join(choices),
        "keys": f'(__fish_complete_list , "string split \\" \\" -- \\"{" ".join(choices)}\\"")',
        "any": "",
    }[kind]
    return f" {needed} -a {_fish_text(arguments)}" if arguments else f" {needed}"


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
