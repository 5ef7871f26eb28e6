# zsh -f offers.zsh LINE: prints what zsh offers at the end of LINE, as "OFFER word".
# A second zsh, at a terminal of its own, reads this file again with INSIDE set; there compadd
# tells what it is given.
if [[ -z $INSIDE ]]; then
    zmodload zsh/zpty
    zpty z INSIDE=$0 zsh -f -i
    zpty -w z "PS1=; PS2=; fpath=($PWD/completions/zsh \$fpath); source \$INSIDE"
    zpty -r z said '*READY*' || exit 2
    zpty -n -w z "$1"$'\t'
    zpty -r z said '*FINISHED*' || exit 3
    print -r -- "$said"
    zpty -d z
    exit
fi
autoload -Uz compinit
compinit -u -D
compadd() {
    if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then
        builtin compadd "$@"
        return
    fi
    local -a hits
    builtin compadd -A hits "$@"
    local suffix=
    (( ${@[(I)-S]} )) && suffix=${@[${@[(I)-S]}+1]}
    print -rl -- "OFFER "$^hits$suffix
}
finished() { print FINISHED; }
zle -C tell complete-word _main_complete
bindkey '^I' tell
comppostfuncs=(finished)
stty -echo
print READY
