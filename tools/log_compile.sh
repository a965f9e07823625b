#!/bin/sh
# Runs a compiler command (`log_compile.sh nvcc ... -o x.o`) and keeps all that it prints in x.o.log.
log=/dev/null
previous=
for argument in "$@"; do
  [ "$previous" = "-o" ] && log=$argument.log
  previous=$argument
done
"$@" >"$log" 2>&1
status=$?
# The resource report reads the lines of ptxas from the log; only what else there is goes to the terminal.
grep -v -e '^ptxas info' -e '^ *[0-9]* bytes stack frame' "$log" >&2
exit $status
