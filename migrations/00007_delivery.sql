-- +goose Up
-- Events that are held back: refused by the broker and to be tried again, behind an event of their order that is, or parked. What
-- is pending is outbox and outbox_held.
CREATE TABLE outbox_held (
    id              bigint PRIMARY KEY, -- as in the outbox
    event_id        uuid NOT NULL,
    aggregate_id    uuid NOT NULL,
    event_type      text NOT NULL,
    source          text NOT NULL,
    payload         json NOT NULL,
    traceparent     text,
    created_at      timestamptz NOT NULL,
    attempts        integer NOT NULL DEFAULT 0, -- how often the broker has refused it
    next_attempt_at timestamptz, -- when it is tried again; NULL: it waits for an event before it, or to be unparked
    last_error      text
);
CREATE INDEX outbox_held_by_order ON outbox_held (aggregate_id, id);
CREATE INDEX outbox_held_by_attempt ON outbox_held (next_attempt_at) WHERE next_attempt_at IS NOT NULL;

-- Orders whose events an operator holds back.
CREATE TABLE outbox_parked (
    aggregate_id uuid PRIMARY KEY,
    parked_at    timestamptz NOT NULL DEFAULT now()
);

-- Events that the broker refused for good. An operator may requeue or drop them.
CREATE TABLE outbox_dead (
    id           bigint PRIMARY KEY,
    event_id     uuid NOT NULL,
    aggregate_id uuid NOT NULL,
    event_type   text NOT NULL,
    source       text NOT NULL,
    payload      json NOT NULL,
    traceparent  text,
    created_at   timestamptz NOT NULL,
    attempts     integer NOT NULL,
    reason       text NOT NULL,
    died_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX outbox_dead_by_order ON outbox_dead (aggregate_id);
CREATE INDEX outbox_dead_by_age ON outbox_dead (died_at);

-- What the relays know together; one row.
CREATE TABLE relay_state (
    one           boolean PRIMARY KEY DEFAULT true CHECK (one),
    epoch         text NOT NULL DEFAULT '', -- names one life of the broker's memory; another means that it forgot
    redrive_at    timestamptz, -- what was published up to here is published again already; NULL: nothing is to be
    redrive_id    bigint NOT NULL DEFAULT 0,
    redriven      bigint NOT NULL DEFAULT 0, -- how many were published again so far
    finished_to   timestamptz NOT NULL DEFAULT 'epoch' -- every event that was published before is finished by every consumer
);
INSERT INTO relay_state DEFAULT VALUES;

-- Why an event is dead to a consumer.
ALTER TABLE inbox ADD COLUMN reason text;
ALTER TABLE inbox ADD CHECK ((state = 'dead') = (reason IS NOT NULL));

-- What operators did.
CREATE TABLE operations (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at     timestamptz NOT NULL DEFAULT now(),
    who    text NOT NULL,
    what   text NOT NULL, -- the command line
    events bigint NOT NULL -- how many it concerned
);

-- +goose Down
DROP TABLE operations;
ALTER TABLE inbox DROP COLUMN reason;
DROP TABLE relay_state;
DROP TABLE outbox_dead;
DROP TABLE outbox_parked;
DROP TABLE outbox_held;
