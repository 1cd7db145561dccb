/*
 * A Redis that forgets: the epoch, publishing again from the archive, and new events that wait.
 *
 * README.md maps each step to the code, says what is left out and why, and lists what each -DREMOVE_... breaks.
 *
 * All events are of one order, and are written one after the other; of ids that commit late tells claim.pml.
 */

#define EVENTS 2
#define ALL (bit(1) | bit(2))
#define RELAYS 2
#define NOBODY RELAYS
#ifndef FORGETS
#define FORGETS 2
#endif
#define NEVER 9
#define bit(e) (1 << (e))
#define has(set, e) (((set) >> (e)) & 1)
#define below(e) (bit(e) - 2) /* the set of the events before e */

/* A fault may happen at any step and any number of times; with FAULTS, which the liveness property needs, only so often. */
#ifdef FAULTS
byte faults;
#define possible (faults < FAULTS)
#define count faults++
#else
#define possible true
#define count skip
#endif

/* PostgreSQL */
byte written;          /* events 1 to written are committed, */
byte archived;         /* and 1 to archived have been published, in that order: outbox_published */
byte finished;         /* the set of those that are sent, in the inbox */
byte epoch = NEVER;    /* relay_state: which life of Redis is known, */
byte redriven = NEVER; /* and up to which entry of the archive events are published again; NEVER: there is nothing to do */
byte turn = NOBODY;

/* Redis */
byte life;      /* how often it has forgotten */
bool stream;    /* it is there, */
bool marked;    /* with the group that is its mark */
byte published; /* the set of events that were published in this life */

/* Any round may look at the epoch, or not. With FAULTS, for the liveness property, the next one does after a failure and a while. */
#ifdef FAULTS
bool due = true;
#define look_or_not checked = due || seen == NEVER
#define looked due = (checked -> false : due)
#define look_next due = true
#else
#define look_or_not if :: checked = true :: seen != NEVER -> checked = false fi
#define looked skip
#define look_next skip
#endif

/* What Redis asks before it adds an event. */
#if defined(REMOVE_EPOCH)
#define in_that_life true
#elif defined(REMOVE_FENCE)
#define in_that_life stream /* XADD with NOMKSTREAM, alone */
#else
#define in_that_life stream && marked && life == seen
#endif

proctype Writer()
{
	do
	:: written < EVENTS -> written++
	:: else -> break
	od
}

#ifdef FAULTS
/* Time: checkEvery has passed. */
proctype Clock()
{
end:	do
	:: !due -> due = true
	od
}
#endif

proctype Redis()
{
end:	do
	:: atomic {
		life < FORGETS -> life++; published = 0;
#ifndef OLD_DUMP /* which has a stream, and its old mark, but is another run of the server */
		stream = false; marked = false
#endif
	}
	od
}

/* The consumers, which finish what is published in any order. More of them is in consume.pml. */
proctype Consumer()
{
end:	do
	:: atomic { has(published & ~finished, 1) -> finished = finished | bit(1) }
	:: atomic { has(published & ~finished, 2) -> finished = finished | bit(2) }
	:: atomic { !stream -> stream = true } /* RedisSubscription.createGroup */
	od
}

/* Rounds: Relay.take */
proctype Relay(byte r)
{
	byte seen = NEVER; /* the life in which this relay believes Redis to be, from its last committed look */
	byte e, archive, again, known;
	bool checked;
end:
next_round:
	atomic { turn == NOBODY -> turn = r; archive = archived; again = redriven; known = epoch; look_or_not };
#ifndef REMOVE_EPOCH
	if /* Relay.checkEpoch */
	:: atomic { !checked -> goto claim }
	:: checked -> skip
	fi;
	do /* RedisStreams.Epoch */
	:: atomic { stream && marked -> seen = life; break }
	:: atomic { !(stream && marked) -> stream = true; marked = true } /* XGROUP CREATE with MKSTREAM */
	:: atomic { possible -> count; goto failed }
	od;
	atomic { /* StartRedrive */
		again = (seen == known -> again : (known == NEVER -> NEVER : 0));
		known = seen };
#endif
claim:
	atomic {
		if
		:: again == NEVER && archive < written -> archive++; e = archive /* ClaimOutboxBatch */
		:: again == NEVER && archive == written
		:: again < archive -> again++; e = (has(finished, again) -> 0 : again) /* FindUnfinishedEvents, MoveRedrive */
		:: again == archive -> again = NEVER                                   /* EndRedrive */
		fi
	};
	if
	:: true
#ifndef FAULTS /* what it publishes then is another's, and makes nothing more likely to be finished */
	:: turn = NOBODY /* it stands still, PostgreSQL ends its transaction, and then it goes on */
#endif
	:: atomic { possible -> count; goto failed } /* it dies, or a server does not answer */
	fi;
	if /* RedisStreams.Publish */
	:: atomic { e > 0 && in_that_life ->
		assert(!(below(e) & ~(published | finished))); /* nothing overtakes what was lost */
		published = published | bit(e) }
	:: atomic { e > 0 && !(in_that_life) -> goto failed } /* ErrForgot */
	:: e == 0
	fi;
	if
	:: atomic { turn == r -> /* COMMIT, Relay.settle */
		archived = archive; redriven = again; epoch = known; turn = NOBODY;
		looked;
		goto over }
	:: turn != r
	:: atomic { possible -> count; goto failed }
	fi;
failed:
	atomic { turn = (turn == r -> NOBODY : turn); seen = NEVER; look_next };
over:
	atomic { e = 0; archive = 0; again = 0; known = 0; checked = false; goto next_round }
}

init {
	atomic {
		run Writer(); run Redis(); run Consumer(); run Relay(0); run Relay(1);
#ifdef FAULTS
		run Clock()
#endif
	}
}

#ifdef FAULTS
/* With faults so many and no more, every committed event is finished. */
ltl finished_at_last { <> [] (finished == ALL) }
#endif
