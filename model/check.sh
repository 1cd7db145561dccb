#!/bin/sh
# Checks the models exhaustively with spin, and that each device is needed: without it spin has to find a counterexample.
set -eu
cd "$(dirname "$0")"
for program in spin cc; do
	command -v "$program" >/dev/null || { echo "The models need $program: install it, for example with \`apt-get install spin gcc libc6-dev\`" >&2; exit 1; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
here=$PWD failed=0

# check MODEL EXPECTED [-D...]: EXPECTED is clean, assertion, or cycle. A model with FAULTS or LIVE is checked for its
# liveness property, with weak fairness.
check() {
	model=$1 expected=$2
	shift 2
	cd "$folder"
	case " $* " in
	*' -DFAULTS='* | *' -DLIVE '*) compile='-DNFAIR=4' run='-a -f' ;;
	*) compile='-DSAFETY' run='' ;;
	esac
	spin -a "$@" "$here/$model.pml" >said 2>&1 || { cat said; exit 1; }
	cc -O2 -w -DCOLLAPSE -DMEMLIM=4000 $compile -o pan pan.c
	./pan -m1000000 -w22 $run >said 2>&1 || true
	found=incomplete
	if grep -q 'assertion violated' said; then found=assertion
	elif grep -q 'acceptance cycle (' said; then found=cycle
	elif grep -q 'errors: 0' said && ! grep -qi 'max search depth too small\|Search not completed\|memory limit' said; then found=clean
	fi
	states=$(sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' said)
	time=$(sed -n 's/.*elapsed time \([0-9.]*\) seconds/\1/p' said)
	printf '%-9s %-42s %-10s %9s states %6s s\n' "$model" "${*:-(no bound on faults)}" "$found" "$states" "$time"
	if [ "$found" != "$expected" ]; then
		echo "  expected $expected:"; grep -v '^Depth' said | head -20
		failed=1
	fi
	cd "$here"
}

check intake clean
check intake clean -DFAULTS=1
check intake assertion -DREMOVE_UNIQUE_KEY
check intake assertion -DREMOVE_TOKEN
check intake assertion -DREMOVE_LOOKUP
check intake assertion -DREMOVE_FINGERPRINT
check intake cycle -DFAULTS=1 -DREMOVE_EXPIRY
exit $failed
