/*
 * From the outbox to the broker: writers whose ids commit out of order, the turn, the claim, publish, commit, and the floor.
 *
 * README.md maps each step to the code, says what is left out and why, and lists what each -DREMOVE_... breaks.
 *
 * An event is named by its id. The events are of two orders, and event 1 may commit after event 2; with SAME_ORDER they are of one,
 * and who writes 2 begins when the transaction that wrote 1 has ended.
 */

#define EVENTS 2
#define RELAYS 2
#define BATCH 1
#ifdef REMOVE_MATERIALIZED
#define LIMIT EVENTS /* the LIMIT is evaluated again */
#else
#define LIMIT BATCH
#endif
#ifdef REMOVE_HORIZON
#define WAITS_FOR(writers) 0
#else
#define WAITS_FOR(writers) writers
#endif
#define NOBODY RELAYS
#define EVERYTHING 9
#define bit(e) (1 << (e))
#define has(set, e) (((set) >> (e)) & 1)

/* A fault may happen at any step and any number of times; with FAULTS, which the liveness property needs, only so often. */
#ifdef FAULTS
byte faults;
#define possible (faults < FAULTS)
#define count faults++
#else
#define possible true
#define count skip
#endif
#define fault possible -> count

/* PostgreSQL. What ends in s is a set of events. */
byte given;           /* the last id that was given out: pg_sequence_last_value */
byte writers;         /* whose transactions hold the lock of an INSERT on the outbox: outbox_writers */
byte pending;         /* they have been given an id, and have not ended */
byte outbox, archive; /* rows that can be seen */
byte ended;
byte strangers;       /* rows that somebody else has locked: FOR UPDATE SKIP LOCKED passes them by */
byte turn = NOBODY;   /* pg_try_advisory_xact_lock */
bool open[RELAYS];    /* the relay's transaction, */
byte moved[RELAYS];   /* and the rows that it has deleted, which it alone has locked */

byte published;

/* worker.floor, of relay 0. Relay 1 is always one that was just started: it has none. */
byte floor, noted, next, awaited;
byte passed, back; /* who was passed, and where the floor was before */

/* order.Store.write, as far as the outbox is concerned. The lock comes before the id, and goes after the row can be seen. */
proctype Writer(byte e)
{
#ifdef SAME_ORDER
	e == 1 || has(ended, 1);
#endif
	atomic { writers = writers | bit(e) };
	atomic { given == e - 1 -> given = e; pending = pending | bit(e) };
	atomic {
		pending = pending & ~bit(e);
		if
		:: outbox = outbox | bit(e)
		:: skip /* it rolls back */
		fi
	};
	atomic { writers = writers & ~bit(e); ended = ended | bit(e) }
}

#ifdef STRANGER
/* Somebody who locks a row by hand. */
proctype Stranger()
{
	if
	:: atomic { has(outbox, 1) && !has(moved[0] | moved[1], 1) -> strangers = bit(1) };
		strangers = 0
	:: has(ended, 1)
	fi
}
#endif

/* Relay.look */
proctype Look()
{
end:	do
#ifndef REMOVE_LOOK
	:: d_step { /* FindLowestOutboxID, floor.lower */
		has(outbox, 1) && floor >= 1 || has(outbox, 2) && floor >= 2 ->
		floor = (has(outbox, 1) -> 0 : 1); next = 0; noted = 0; awaited = 0
	}
#else
	:: false
#endif
	od
}

inline rollback()
{
	turn = (open[r] && turn == r -> NOBODY : turn);
	open[r] = false; moved[r] = 0
}

inline publish(e)
{
#ifdef SAME_ORDER
	assert(e == 1 || has(published, 1) || !has(outbox | archive, 1)); /* the events of an order are published in order */
#endif
	published = published | bit(e); batch = batch & ~bit(e)
}

inline rise()
{
	next = (next < upTo -> next : upTo);
	floor = (floor > next -> floor : next);
	next = 0; awaited = 0
}

/* Rounds: Relay.take. A relay whose transaction PostgreSQL has ended goes on until it asks PostgreSQL again. */
proctype Relay(byte r)
{
	byte batch, seen, last, upTo, e, n;
end:
again:
	atomic { /* TakeTurn */
#ifndef REMOVE_TURN
		turn == NOBODY ->
#endif
		turn = r; open[r] = true;
		seen = (r == 0 -> writers : 0); last = (r == 0 -> given : 0)
	};
	if
	:: d_step { /* ClaimOutboxBatch, and what Relay.round notes of it */
		open[r] ->
		for (e : 1 .. EVENTS) {
			if
			:: e > (r == 0 -> floor : 0) && has(outbox, e) && !has(strangers | moved[1 - r], e) && n < LIMIT -> batch = batch | bit(e); n++; upTo = e
			:: else
			fi
		};
		assert(n <= BATCH); /* the batch is bounded */
		moved[r] = batch;
		upTo = (n >= BATCH && r == 0 -> upTo : EVERYTHING);
		e = 0; n = 0 }
	:: atomic { !open[r] -> goto failed }
	:: atomic { fault; goto failed }
	fi;
#ifndef REMOVE_RETURN
	if /* Relay.checkPassed */
	:: atomic { r == 0 && open[r] && (passed & ~writers) ->
		floor = (floor > back -> back : floor); next = 0; noted = 0; awaited = 0; passed = 0; back = 0; goto failed }
	:: atomic { r == 1 || !(passed & ~writers) }
	:: atomic { !open[r] -> goto failed }
	fi;
#endif
	do /* Relay.publish */
	:: atomic { has(batch, 1) -> publish(1) }
	:: atomic { !has(batch, 1) && has(batch, 2) -> publish(2) }
	:: atomic { batch == 0 && open[r] -> /* COMMIT */
		assert(!(moved[r] & ~published)); /* nothing leaves the outbox that is not published */
		outbox = outbox & ~moved[r]; archive = archive | moved[r];
		rollback();
		if
		:: r == 0 -> break
		:: r == 1 -> goto failed
		:: possible -> count; goto failed /* the reply is lost, or this round did not ask who writes: nothing is noted */
		fi }
	:: atomic { batch == 0 && !open[r] -> goto failed }
	:: atomic { open[r] && possible -> count; rollback() } /* PostgreSQL ends the transaction, and the relay does not know */
	:: atomic { fault; goto failed }                       /* the broker does not answer, or not in time */
	:: atomic { r == 0 && possible -> count; floor = 0; noted = 0; next = 0; awaited = 0; passed = 0; back = 0; goto failed } /* it dies, and another is started */
	od;
	atomic { /* floor.raise */
		if
		:: next == 0 && noted > floor -> next = noted; awaited = WAITS_FOR(seen) & ~passed
		:: else
		fi;
		if
		:: next > 0 && (awaited & seen) /* it waits */
		:: next > 0 && (awaited & seen) -> /* no longer */
			back = (passed -> back : floor); passed = passed | awaited & seen; rise()
		:: next > 0 && !(awaited & seen) -> rise()
		:: next == 0
		fi;
		noted = last;
#ifndef LEFT_BEHIND
		/* The floor passes nothing that may still commit, but for those of whom it knows. */
		assert(!(floor >= 1 && has(pending & ~passed, 1) || floor >= 2 && has(pending & ~passed, 2)))
#endif
	};
failed:
	atomic { rollback(); batch = 0; seen = 0; last = 0; upTo = 0; goto again }
}

init {
	atomic {
		run Writer(1); run Writer(2); run Relay(0); run Relay(1); run Look();
#ifdef STRANGER
		run Stranger()
#endif
	}
}

#ifdef FAULTS
/* With faults so many and no more, everything that was committed is published. */
ltl published_at_last { <> [] (ended == (bit(1) | bit(2)) && outbox == 0) }
#endif
