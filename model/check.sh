#!/bin/sh
# Checks the models exhaustively with spin, and that each device is needed: without it spin has to find a counterexample.
set -eu
cd "$(dirname "$0")"
here=$PWD failed=0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
cd "$folder"

# check MODEL EXPECTED [-D...]: EXPECTED is clean, cycle (the liveness property fails), or a part of the assertion that fails. With FAULTS
# a model is checked for its liveness property, with weak fairness.
check() {
	model=$1 expected=$2
	shift 2
	case " $* " in
	*' -DFAULTS='*) compile=-DNFAIR=4 run='-a -f' ;;
	*) compile=-DSAFETY run= ;;
	esac
	case $expected in
	clean) optimize=-O2 ;;
	*) optimize=-O0 ;; # a counterexample is found sooner than this compiles
	esac
	rm -f said ./*.trail
	# shellcheck disable=SC2086 # run is split on purpose
	{ spin -a "$@" "$here/$model.pml" && cc "$optimize" -w -DMEMLIM=2000 "$compile" -o pan pan.c && ./pan -m1000000 -w22 $run; } >said 2>&1 ||
		echo "exit status $?" >>said
	if grep -q 'assertion violated' said; then found=$(sed -n 's/^pan:[0-9]*: assertion violated *\(.*\) (at depth.*/\1/p' said)
	elif grep -q 'acceptance cycle (' said; then found=cycle
	elif grep -q 'errors: 0' said && ! grep -qi 'exit status\|depth too small\|not completed\|memory limit\|out of memory' said; then found=clean
	else found='not completed'
	fi
	states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' said)
	time=$(sed -n 's/^pan: elapsed time \([0-9.]*\) seconds/\1/p' said)
	printf '%-8s %-38s %10s states %6s s  %s\n' "$model" "$*" "$states" "$time" "$found"
	case $found in
	*"$expected"*) ;;
	*)
		echo "  expected: $expected"
		grep -v '^Depth\|^$' said | sed 's/^/  /' | head -20
		failed=1
		;;
	esac
}

check intake clean
check intake clean -DFAULTS=1
check intake 'orders<=1' -DREMOVE_UNIQUE_KEY
check intake 'standing==send' -DREMOVE_TOKEN
check intake 'holder==row' -DREMOVE_LOOKUP
check intake 'asks[holder]==asks[send]' -DREMOVE_FINGERPRINT
check intake cycle -DFAULTS=1 -DREMOVE_EXPIRY

check claim clean
check claim clean -DSAME_ORDER
check claim clean -DFAULTS=1
check claim clean -DFAULTS=1 -DREMOVE_LOOK
check claim clean -DFAULTS=0 -DSTRANGER
check claim 'published>>1' -DSAME_ORDER -DREMOVE_TURN
check claim 'n<=1' -DREMOVE_MATERIALIZED
check claim 'floor>=1' -DREMOVE_HORIZON
check claim 'published>>1' -DSAME_ORDER -DREMOVE_RETURN
check claim cycle -DFAULTS=0 -DREMOVE_LOOK -DREMOVE_RETURN
check claim cycle -DFAULTS=0 -DREMOVE_HORIZON -DLEFT_BEHIND -DREMOVE_LOOK
check claim clean -DFAULTS=0 -DREMOVE_HORIZON -DLEFT_BEHIND # until the look below the floor
check claim cycle -DFAULTS=0 -DSTRANGER -DREMOVE_LOOK

check redrive clean
check redrive clean -DOLD_DUMP
check redrive clean -DFAULTS=1 -DFORGETS=1
check redrive clean -DFAULTS=0 -DFORGETS=1 -DOLD_DUMP
check redrive 'published|finished' -DREMOVE_FENCE
check redrive 'published|finished' -DREMOVE_FENCE -DOLD_DUMP
check redrive cycle -DFAULTS=0 -DFORGETS=1 -DREMOVE_EPOCH

check consume clean
check consume clean -DFAULTS=3
check consume 'allowed>0' -DREMOVE_INBOX
check consume 'holder==c' -DREMOVE_TOKEN
check consume 'allowed>0' -DREMOVE_TOKEN -DONLY_MAILS
exit $failed
