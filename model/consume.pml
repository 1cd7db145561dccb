/*
 * From the broker to the mail: at-least-once delivery, two consumers, the inbox with its holder; crash, standstill and stop.
 *
 * README.md maps each step to the code, says what is left out and why, and lists what each -DREMOVE_... breaks.
 *
 * There is one event, for the inbox and the mails of events have nothing to do with each other. It stands in the stream twice.
 */

#define ENTRIES 2
#define CONSUMERS 2
#define NOBODY CONSUMERS
#define STOPPED (CONSUMERS + 1) /* a consumer that is no more */

/* A fault may happen at any step and any number of times; with FAULTS, which the liveness property needs, only so often. */
#ifdef FAULTS
byte faults;
#define possible (faults < FAULTS)
#define count faults++
#else
#define possible true
#define count skip
#endif

/* The broker. What is not acknowledged may be delivered, to anybody and again, at any moment. */
bool acknowledged[ENTRIES];

/* The inbox, in PostgreSQL: the event's row. */
mtype = { NONE, RECEIVED, SENT };
mtype row = NONE;
byte holder = NOBODY;

/* The time since the row was entered: STALE is half of what makes it ABANDONED. */
mtype = { FRESH, STALE, ABANDONED };
mtype age = FRESH;

bool stale[CONSUMERS];   /* by a consumer's own clock: it need not know what became of the row */
bool sending[CONSUMERS]; /* from the look at the clock until the row is marked */

/* How many mails may still be sent. There is one; and one more each time that nobody can decide whether it was sent: when a
 * consumer dies, stands still or cannot reach PostgreSQL between the look at the clock, the mail, and the mark. */
byte allowed = 1;
#define fault possible -> count
#define excuse allowed < CONSUMERS -> allowed++

/* Time. A mail is given up long before a row that was not stale when it began is abandoned (sendTimeout): only a fault takes longer. */
proctype Clock()
{
end:	do
	:: atomic { row == RECEIVED && age == FRESH && holder == STOPPED -> age = STALE }
	:: atomic { row == RECEIVED && age == FRESH && holder < CONSUMERS && possible -> count; age = STALE; stale[holder] = true }
	:: atomic { row == RECEIVED && age == STALE && (holder == STOPPED || !sending[holder]) -> age = ABANDONED }
	:: atomic { row == RECEIVED && age == STALE && holder < CONSUMERS && sending[holder] && possible && excuse; count; age = ABANDONED }
	od
}

/* It dies, and another is started in its place: its token is another. */
inline die()
{
	holder = (holder == c -> STOPPED : holder);
	stale[c] = false; sending[c] = false
}

/* MarkSent and LeaveInbox are fenced by the holder. */
#ifdef REMOVE_TOKEN
#define isMine (row == RECEIVED)
#else
#define isMine (row == RECEIVED && holder == c)
#endif
#ifdef ONLY_MAILS
#define late_finishers_touch_nothing true
#else
#define late_finishers_touch_nothing (holder == c)
#endif

/* The way of a task through a shift. */
proctype Consumer(byte c)
{
	byte entry;
end:
receive:
	if
	:: !acknowledged[0] -> entry = 0
	:: !acknowledged[1] -> entry = 1
	fi;
enter: /* EnterInbox and FindFinished, in Consumer.enter */
	if
#ifdef REMOVE_INBOX
	:: true
#else
	:: atomic { row == NONE || row == RECEIVED && (holder == c || age == ABANDONED) -> row = RECEIVED; holder = c; age = FRESH; stale[c] = false }
	:: row == SENT -> goto acknowledge
	/* else shift.leave: it looks again later */
#endif
	:: atomic { fault; die(); goto over }
	fi;
ready:
	if
	:: atomic { !stale[c] -> sending[c] = true }
	:: stale[c] -> goto enter /* shift.enterAgain */
	:: atomic { fault; /* SIGTERM: shift.release, LeaveInbox */
		if
		:: isMine -> assert(late_finishers_touch_nothing); row = NONE; holder = NOBODY; age = FRESH
		:: else
		fi;
		die(); goto over }
	:: atomic { fault; die(); goto over }
	fi;
	if
	:: atomic { assert(allowed > 0); allowed-- } /* at most one mail, but for what cannot be decided */
	:: atomic { fault; sending[c] = false; goto enter } /* shift.failed: the mail server does not take it now */
	:: atomic { fault; die(); goto over }
	fi;
	if
	:: atomic { isMine -> /* MarkSent */
		assert(late_finishers_touch_nothing);
		row = SENT; holder = NOBODY; age = FRESH; sending[c] = false }
	:: atomic { !isMine -> sending[c] = false; goto enter } /* shift.leave */
	:: atomic { possible && excuse; count; die(); goto over }
	fi;
acknowledge:
	if
	:: atomic { acknowledged[entry] = true }
	:: atomic { fault; die() }
	fi;
over:
	atomic { entry = 0; goto receive }
}

init { atomic { run Consumer(0); run Consumer(1); run Clock() } }

#ifdef FAULTS
/* With faults so many and no more, the event ends as sent, and nothing is delivered any more. */
ltl sent { <> [] (row == SENT && acknowledged[0] && acknowledged[1]) }
#endif
