# Made by "python -m tools.manual": change the tables, not this file.
complete -c vtpmd -f
complete -c vtpmd -l user -f -d 'keep everything in the user\'s own folders; without it, root\'s'
complete -c vtpmd -l state -x -a '(__fish_complete_directories)' -d 'folder of the TPMs, made if it is missing'
complete -c vtpmd -l run -x -a '(__fish_complete_directories)' -d 'folder of their sockets, made if it is missing'
complete -c vtpmd -l idle -x -d 'seconds without a command after which a TPM sleeps, by default 1'
complete -c vtpmd -l pool -x -d 'how many manufactured TPMs are made ahead of time, when nothing else is to be done; by default 2, once somebody has wanted one'
complete -c vtpmd -l quota -x -a '(__fish_complete_list , "string split \\" \\" -- \\"tpms= mib=\\"")' -d 'what one user may have'
complete -c vtpmd -l group -x -d 'members of this group may ask it, each for TPMs of his own'
complete -c vtpmd -l metrics-file -r -F -d 'write every 15 seconds what the TPMs do, for node_exporter\'s textfile collector'
complete -c vtpmd -l cdi -x -a '(__fish_complete_directories)' -d 'folder of the documents by which containers find TPMs, by default of root\'s /run/cdi'
complete -c vtpmd -l log -x -a '(__fish_complete_list , "string split \\" \\" -- \\"file= fd= level= prefix= truncate\\"")' -d 'where messages go, by default to standard error'
complete -c vtpmd -s h -l help -f -d 'print this help and end'
complete -c vtpmd -s v -l version -f -d 'print the version and end'
