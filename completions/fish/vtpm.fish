# Made by "python -m tools.manual": change the tables, not this file.
complete -c vtpm -n __fish_use_subcommand -f -a doctor -d 'what this machine offers, and what to type next'
complete -c vtpm -n __fish_use_subcommand -f -a rc -d 'what a response code means'
complete -c vtpm -n __fish_use_subcommand -f -a trace -d 'the commands of a packet capture, readable'
complete -c vtpm -n __fish_use_subcommand -s v -l version -f -d 'print the version and end'
complete -c vtpm -n __fish_use_subcommand -s h -l help -f -d 'print this help and end; each command has its own'
complete -c vtpm -n '__fish_seen_subcommand_from doctor rc' -f
complete -c vtpm -n '__fish_seen_subcommand_from doctor' -l json -f -d 'print the findings as JSON, for scripts'
complete -c vtpm -n '__fish_seen_subcommand_from doctor rc trace' -s h -l help -f -d 'print this help and end'
complete -c vtpm -n '__fish_seen_subcommand_from rc' -l tpm12 -f -d 'the codes are a TPM 1.2\'s, whatever they look like'
complete -c vtpm -n '__fish_seen_subcommand_from rc' -l json -f -d 'print an object for each code, on a line of its own'
complete -c vtpm -n '__fish_seen_subcommand_from trace' -l json -f -d 'print an object for each command, on a line of its own'
