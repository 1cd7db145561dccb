#!/bin/sh
# Makes sure that redis-server and PostgreSQL are installed: the tests start their own from them. Silent when they are.
# `install.sh spin` makes sure of spin instead, and of the C compiler that it needs, for the models.
#
# As root it installs what is missing with apt-get, without starting it as a service; otherwise with Homebrew; without
# either it says what to install. It looks where the tests look: internal/local/binaries.go and internal/local/redis.go.
set -eu

# found says whether the programs $1 stand together in one of the folders $4..., the first of them in version $3
# (major.minor) or later. $2 is what stands before the version when the program tells it.
found() {
	programs=$1 before=$2 least=$3
	shift 3
	for folder; do
		for program in $programs; do
			[ -x "$folder/$program" ] || continue 2
		done
		version=$("$folder/${programs%% *}" --version 2>/dev/null </dev/null | sed -n "s/.*$before\([0-9][0-9.]*\).*/\1/p")
		case $version in
		'') continue ;;
		*.*) ;;
		*) version=$version.0 ;; # a beta has no minor version
		esac
		major=${version%%.*} minor=${version#*.} minor=${minor%%.*}
		[ "$major" -gt "${least%.*}" ] && return
		[ "$major" -eq "${least%.*}" ] && [ "$minor" -ge "${least#*.}" ] && return
	done
	return 1
}

has_redis() {
	found redis-server 'v=' 6.2 "$@" /usr/bin /usr/local/bin \
		/opt/homebrew/bin /opt/homebrew/opt/redis/bin /usr/local/opt/redis/bin
}

has_postgresql() {
	found 'postgres initdb' '(PostgreSQL) ' 14.0 "$@" /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/libexec/postgresql* \
		/opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin /opt/homebrew/bin /usr/local/pgsql/bin \
		/Applications/Postgres.app/Contents/Versions/*/bin
}

what=${1:-servers} purpose=tests
[ "$what" != spin ] || purpose=models

# look sets redis, postgresql and spin to what has to be installed: nothing, or the name.
look() {
	redis='' postgresql='' spin=''
	if [ "$what" = spin ]; then
		command -v spin >/dev/null && command -v cc >/dev/null || spin=spin
		return
	fi
	set -f # a folder of the PATH is no pattern
	saved_ifs=$IFS IFS=:
	# shellcheck disable=SC2086 # split on purpose
	set -- $PATH
	IFS=$saved_ifs
	set +f
	has_redis "$@" || redis=redis
	has_postgresql "$@" || postgresql=postgresql
}

# install_with_apt installs packages without starting their services.
install_with_apt() {
	policy=/usr/sbin/policy-rc.d # asked by every package before it starts a service; 101 forbids it
	if [ ! -e "$policy" ]; then
		trap 'rm -f "$policy"' EXIT
		trap 'exit 1' HUP INT TERM
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod +x "$policy"
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get -q -o DPkg::Lock::Timeout=300 update || echo "apt-get update failed: going on with the lists that are here" >&2
	apt-get -q -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
}

look
[ -n "$redis$postgresql$spin" ] || exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
	set -- ${redis:+redis-server} ${postgresql:+postgresql} ${spin:+spin gcc libc6-dev}
	echo "Installing $* with apt-get, for the $purpose"
	install_with_apt "$@" </dev/null
elif [ "$(id -u)" -ne 0 ] && command -v brew >/dev/null; then
	set -- ${redis:+redis} ${postgresql:+postgresql@17} ${spin:+spin}
	echo "Installing $* with Homebrew, for the $purpose"
	brew install "$@" </dev/null
fi

look
[ -n "$redis$postgresql$spin" ] || exit 0
wanted=${redis:+redis-server 6.2 or newer}${redis:+${postgresql:+ and }}${postgresql:+PostgreSQL 14 or newer (postgres and initdb)}${spin:+spin and a C compiler}
how=
if command -v apt-get >/dev/null; then
	how=", for example with \`sudo apt-get install${redis:+ redis-server}${postgresql:+ postgresql}${spin:+ spin gcc libc6-dev}\`"
fi
echo "The $purpose need $wanted: install it$how" >&2
exit 1
