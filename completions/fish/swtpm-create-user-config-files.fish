# Made by "python -m tools.manual": change the tables, not this file.
complete -c swtpm-create-user-config-files -f
complete -c swtpm-create-user-config-files -l overwrite -f -d 'write over files that are there'
complete -c swtpm-create-user-config-files -l root -f -d 'for root, too, whose files then count before those of the machine'
complete -c swtpm-create-user-config-files -l skip-if-exist -f -d 'do nothing if one of them is there'
complete -c swtpm-create-user-config-files -s h -l help -f -d 'display this help and exit'
