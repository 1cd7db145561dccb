-- name: TakeTurn :one
-- The turn ends with the transaction. Writers are the transactions that write to the outbox, if they are wanted: they are read
-- from all locks of the server. last_id is the last id that was given out.
SELECT pg_try_advisory_xact_lock(@turn::bigint) AS taken, COALESCE(CASE WHEN @writers::bool THEN outbox_writers() END, '{}')::text[] AS writers,
       COALESCE(pg_sequence_last_value('outbox_id_seq'), 0)::bigint AS last_id;

-- name: FindWriters :one
-- The transactions that write to the outbox.
SELECT COALESCE(outbox_writers(), '{}')::text[] AS writers;

-- name: ClaimOutboxBatch :many
-- Moves the next events above the floor, in the order of id, from the outbox to the archive, and returns them, with whether
-- others of their order are held back. Claims nothing while events are published again: those come first; nor when the relays know
-- another epoch than this one does. published_at is not the time of the transaction, which may have begun before the turn of another:
-- in the archive events are in the order of turns.
-- The claim is materialized: inlined below the DELETE, the LIMIT could be evaluated again and claim more. The rows are deleted by
-- an array of ids: a join, once it was planned for an empty outbox, would scan a full one.
WITH turn AS MATERIALIZED (
    SELECT clock_timestamp() AS at
), claimed AS MATERIALIZED (
    SELECT o.id FROM outbox o
    WHERE o.id > @floor AND (SELECT s.redrive_at IS NULL AND s.epoch = @epoch FROM relay_state s WHERE s.one)
    ORDER BY o.id LIMIT @batch_size FOR UPDATE SKIP LOCKED
), moved AS (
    DELETE FROM outbox WHERE id = ANY (ARRAY(SELECT claimed.id FROM claimed))
    RETURNING id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at
), archived AS (
    INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at, published_at)
    SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at, (SELECT turn.at FROM turn) FROM moved
)
SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at,
       (SELECT turn.at FROM turn)::timestamptz AS published_at,
       (CASE WHEN (SELECT EXISTS (SELECT FROM outbox_held) OR EXISTS (SELECT FROM outbox_parked))
             THEN EXISTS (SELECT FROM outbox_held h WHERE h.aggregate_id = moved.aggregate_id)
               OR EXISTS (SELECT FROM outbox_parked k WHERE k.aggregate_id = moved.aggregate_id)
             ELSE false END)::boolean AS behind
FROM moved ORDER BY id;

-- name: HoldEvents :exec
-- Takes events out of the archive and holds them back. A refused one has an error, and is tried again after the delay; one
-- without waits for those before it.
WITH back AS (
    SELECT unnest(@ids::bigint[]) AS id, unnest(@errors::text[]) AS error, unnest(@delays::interval[]) AS delay
), moved AS (
    DELETE FROM outbox_published WHERE published_at = ANY (@published_at::timestamptz[]) AND outbox_published.id = ANY (@ids::bigint[])
    RETURNING id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at
)
INSERT INTO outbox_held (id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at, attempts, next_attempt_at, last_error)
SELECT m.id, m.event_id, m.aggregate_id, m.event_type, m.source, m.payload, m.traceparent, m.created_at,
       (back.error <> '')::integer, CASE WHEN back.error <> '' THEN now() + back.delay END, NULLIF(back.error, '')
FROM moved m JOIN back ON m.id = back.id;

-- name: FindDueEvents :many
-- Events that are held back and may be tried again: the first of their order, and not parked.
SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at, attempts
FROM outbox_held h
WHERE h.next_attempt_at <= now() AND NOT EXISTS (SELECT FROM outbox_parked k WHERE k.aggregate_id = h.aggregate_id)
ORDER BY h.next_attempt_at LIMIT @batch_size;

-- name: ArchiveHeldEvents :exec
-- Moves events that were held back, and are published now, to the archive.
WITH turn AS MATERIALIZED (
    SELECT clock_timestamp() AS at
), moved AS (
    DELETE FROM outbox_held WHERE id = ANY (@ids::bigint[])
    RETURNING id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at
)
INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at, published_at)
SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at, (SELECT turn.at FROM turn) FROM moved;

-- name: RetryHeldEvent :exec
UPDATE outbox_held SET attempts = attempts + 1, next_attempt_at = now() + @delay::interval, last_error = @error::text WHERE id = @id;

-- name: BuryHeldEvent :exec
WITH moved AS (
    DELETE FROM outbox_held WHERE outbox_held.id = @id
    RETURNING id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at, attempts
)
INSERT INTO outbox_dead (id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at, attempts, reason)
SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at, attempts + 1, @reason::text FROM moved;

-- name: ReleaseHeldEvents :exec
-- Lets the first event that is held back of each of these orders be tried.
UPDATE outbox_held AS held SET next_attempt_at = now()
WHERE held.id IN (SELECT min(h.id) FROM outbox_held h WHERE h.aggregate_id = ANY (@aggregate_ids::uuid[]) GROUP BY h.aggregate_id)
  AND held.next_attempt_at IS NULL;

-- name: FindLowestOutboxID :one
-- The lowest id that is left at or below the floor; 0 when there is none.
SELECT COALESCE((SELECT id FROM outbox WHERE id <= @floor ORDER BY id LIMIT 1), 0)::bigint;

-- name: CreateOutboxPartitions :one
SELECT create_outbox_partitions(@days_ahead::integer)::integer AS created;
