#!/bin/sh
# Prints a chapter with the output of its commands made anew: scripts/docs.sh docs/2-ddp.md (make docs: all)
# In a block marked "console" a line "$ COMMAND" is run (with "\" at its end, the next line belongs to it), in
# the order of the chapter, all in one new folder where ./train is the program; what follows it up to the next
# command or the block's end is its output.
set -eu
train=$(realpath "${TRAIN:-./train}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$train" "$work/train"
awk -v work="$work" '
    /^```/ { console = !console && $0 == "```console"; print; next }
    console && /^\$ / {
        print
        command = substr($0, 3)
        while (command ~ /\\$/ && (getline line) > 0) {
            print line
            command = command "\n" line
        }
        script = work "/.command"
        printf "%s\n", command >script
        close(script)
        run = "cd " work " && sh .command 2>&1"
        while ((run | getline line) > 0) print line
        close(run)
        next
    }
    !console' "$1"
