/*
 * Placing an order under one idempotency key: reserve, commit, complete; crash and expiry anywhere.
 *
 * README.md maps each step to the code, says what is left out and why, and lists what each -DREMOVE_... breaks.
 *
 * SENDS sends of one key meet: retries of one client while an earlier send is still under way, or others that ask for something
 * else under it. Each is sent again, to either server, until it is answered 200 or 422.
 */

#ifndef SENDS
#define SENDS 2
#endif
#define SERVERS 2
#define NOBODY SENDS

bit asks[SENDS + 1]; /* the fingerprint of each send */

/* A fault may happen at any step and any number of times; with FAULTS, which the liveness property needs, only so often. */
#ifdef FAULTS
byte faults;
#define possible (faults < FAULTS)
#define fault possible -> faults++
#else
#define possible true
#define fault true -> skip
#endif

/* The key in Redis. A value of SENDS and less is held by the token of that send; */
#define ABSENT 10
#define COMPLETED 11
#define FOREIGN SENDS /* ... by the token of a send that is over, or of nobody at all */
#define isHeld(value) (value <= FOREIGN)
byte redis = ABSENT;
bool endless; /* what is held has no expiry: no script of ours writes that, but Redis may lie */

/* The reservation that neither its holder, nor its clock, nor a fault of Redis has ended. */
byte standing = NOBODY;

/* PostgreSQL. row is the row of the key: the send whose order it names. */
byte row = NOBODY;
byte writing = NOBODY; /* whose transaction has written the row, and has not ended */
byte orders;           /* how many were committed */

/* The statement of each send: its server waits for the reply, its backend works. */
mtype = { NONE, ASKED, WON, LOST, REFUSED };
mtype statement[SENDS] = NONE;

byte memory[SERVERS] = NOBODY; /* what a server knows to be committed: order.memory */

byte first = NOBODY; /* the order that the first 200 named */
bool answered[SENDS];

/* A PostgreSQL backend with the statement PlaceOrders, which is a transaction of its own. It works on when its client is gone. */
proctype Backend(byte send)
{
end:
	do
	:: statement[send] == ASKED ->
		if
#ifdef REMOVE_UNIQUE_KEY
		:: writing = send
#else
		:: atomic { writing == NOBODY && row == NOBODY -> writing = send } /* else it waits for the other transaction */
#endif
			if
			:: atomic {
				row = send; orders++; writing = NOBODY; statement[send] = WON;
				assert(orders <= 1) /* at most one order for a key */
			}
			:: atomic { fault; writing = NOBODY; statement[send] = REFUSED }
			fi
#ifndef REMOVE_UNIQUE_KEY
		:: atomic { row != NOBODY -> statement[send] = LOST }
#endif
		:: atomic { fault; statement[send] = REFUSED } /* a deadlock, lock_timeout, a shutdown */
		fi
	od
}

/* Time, for what is held in Redis. */
proctype Clock()
{
end:
	do
	:: atomic { isHeld(redis) && !endless -> redis = ABSENT; standing = NOBODY }
	od
}

/* A Redis that forgets, is restored from another day, or is shared with another database. */
proctype Liar()
{
end:
	do
	:: atomic {
		fault;
		standing = NOBODY;
		if
		:: redis = ABSENT; endless = false
		:: redis = COMPLETED; endless = false
		:: redis = FOREIGN; endless = true
		fi
	}
	od
}

/* reserve.lua */
inline reserve(said)
{
	d_step {
		if
		:: redis == COMPLETED -> said = COMPLETED
		:: isHeld(redis) && redis != send ->
#ifndef REMOVE_EXPIRY
			endless = false; /* PEXPIRE */
#endif
			said = FOREIGN
		:: else ->
			assert(standing == NOBODY || standing == send); /* nobody else's reservation stands */
			redis = send; endless = false; standing = send; said = send
		fi
	}
}

/* complete.lua and release.lua: fenced by the token. */
inline end_reservation(value)
{
	d_step {
		if
#ifdef REMOVE_TOKEN
		:: true ->
#else
		:: redis == send ->
#endif
			redis = value; endless = false;
			if
			:: standing == send -> standing = NOBODY
			:: else
			fi
		:: else
		fi
	}
}

/* Store.findAll, Store.findLosers, Store.lookUp: reads the row, or cannot. */
#define find(found, failed) \
	if \
	:: d_step { found = row; memory[server] = (row == NOBODY -> memory[server] : row) } \
	:: fault; goto failed \
	fi

/* A handler dies with its server, or its answer is lost on the line: the client sends again. */
#define crashes atomic { fault; memory[server] = NOBODY; goto sendAgain }

/* server.PlaceOrder, and a client that sends until it has an answer. */
proctype Send(byte send)
{
	byte server, said, holder;
	bool reserved;

sendAgain:
	/* Its earlier statement has ended, else send 1 stands for it; the token of a new send is a new one. */
	atomic {
		statement[send] != ASKED -> statement[send] = NONE;
		redis = (redis == send -> FOREIGN : redis);
		standing = (standing == send -> FOREIGN : standing);
		said = 0; holder = NOBODY; reserved = false;
		if
		:: server = 0
		:: server = 1
		fi;
		/* Store.Recall */
		if
		:: memory[server] != NOBODY -> holder = memory[server]; goto judge
		:: else
		fi
	};

	/* idempotency.Once */
	if
	:: atomic { reserve(said); reserved = (said == send) }
	:: atomic { fault; said = ABSENT }                /* Redis is away, or the breaker is open */
	:: atomic { fault; reserve(said); said = ABSENT } /* the reply was lost */
	fi;
	if
	:: said == send || said == ABSENT -> goto place
	:: atomic { said == COMPLETED -> said = 0 };
		find(holder, unavailable);
		if
		:: holder == NOBODY -> goto place /* Redis remembers what PostgreSQL does not know */
		:: else -> goto judge
		fi
	:: atomic { said == FOREIGN -> said = 0 };
		find(holder, unavailable);
		if
		:: holder == NOBODY -> goto sendAgain /* 409, or Prefer: wait */
		:: else -> goto judge
		fi
	:: crashes
	fi;

place: /* Store.placeBatch */
	if
	:: atomic { statement[send] = ASKED; said = 0 }
	:: fault; goto unavailable /* no connection: nothing was asked */
	:: crashes
	fi;
	if
	:: atomic { statement[send] == WON -> holder = send; memory[server] = send }
	:: statement[send] == LOST -> find(holder, unavailable)
	:: statement[send] == REFUSED -> goto unavailable
	:: fault; /* the connection broke: whether it was committed, is or will be, nobody knows here */
#ifdef REMOVE_LOOKUP
		if /* then it has to be guessed */
		:: holder = send
		:: goto unavailable
		fi
#else
		find(holder, unknown);
		if
		:: holder == NOBODY -> goto unknown
		:: else
		fi
#endif
	:: crashes
	fi;

judge: /* holding.judge, and the answer */
	atomic {
#ifndef REMOVE_FINGERPRINT
		if
		:: asks[holder] != asks[send] -> /* 422 */
			assert(row != NOBODY && asks[row] != asks[send]); /* never for the same fingerprint */
			goto answer
		:: else
		fi;
#endif
		/* 200 */
		assert(holder == row);              /* it names the one order that is committed under the key, */
		assert(asks[holder] == asks[send]); /* which asked for the same, */
		assert(first == NOBODY || first == holder); /* and it is the first answer again */
		first = holder
	}

answer: /* the completion rides behind the answer: placeReserved, Gatherer.Tell */
	if
	:: atomic { reserved -> end_reservation(COMPLETED) }
	:: atomic { reserved && possible -> fault } /* the completion is lost */
	:: !reserved
	:: crashes                      /* or the answer is */
	fi;
	goto over;

unavailable: /* 503, and nothing was committed: the reservation is given back, and that is waited for */
	atomic {
		assert(statement[send] != WON && statement[send] != ASKED); /* nothing was by this send, and nothing will be */
		if
		:: reserved -> end_reservation(ABSENT)
		:: reserved && possible -> fault /* the release is lost */
		:: !reserved
		fi;
		goto sendAgain
	};

unknown: /* 503, and the reservation is left to its clock */
	goto sendAgain;

over:
	atomic { said = 0; holder = NOBODY; reserved = false; server = 0; answered[send] = true }
}

init {
	atomic {
		byte send = 0;
		do
		:: send < SENDS ->
			if
			:: send > 0 -> asks[send] = 1
			:: skip
			fi;
			run Send(send); run Backend(send); send++
		:: else -> break
		od;
		run Clock(); run Liar()
	}
}

#ifdef FAULTS
/* Reservations end: with faults so many and no more, every send gets its answer. */
ltl answers { <> (answered[0] && answered[1] && answered[SENDS - 1]) }
#endif
