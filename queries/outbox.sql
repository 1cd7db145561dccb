-- name: TakeTurn :one
-- The turn ends with the transaction. Writers are the transactions that write to the outbox, and last_id is the last id that
-- was given out.
SELECT pg_try_advisory_xact_lock(@turn::bigint) AS taken, COALESCE(outbox_writers(), '{}')::text[] AS writers,
       COALESCE(pg_sequence_last_value('outbox_id_seq'), 0)::bigint AS last_id;

-- name: ClaimOutboxBatch :many
-- Moves the next events above the floor, in the order of id, from the outbox to the archive, and returns them. The claim is
-- materialized: inlined below the DELETE, the LIMIT could be evaluated again and claim more. The rows are deleted by an
-- array of ids: a join, once it was planned for an empty outbox, would scan a full one.
WITH claimed AS MATERIALIZED (
    SELECT o.id FROM outbox o WHERE o.id > @floor ORDER BY o.id LIMIT @batch_size FOR UPDATE SKIP LOCKED
), moved AS (
    DELETE FROM outbox WHERE id = ANY (ARRAY(SELECT claimed.id FROM claimed))
    RETURNING id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at
), archived AS (
    INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at)
    SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at FROM moved
)
SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at FROM moved ORDER BY id;

-- name: FindLowestOutboxID :one
-- The lowest id that is left at or below the floor; 0 when there is none.
SELECT COALESCE((SELECT id FROM outbox WHERE id <= @floor ORDER BY id LIMIT 1), 0)::bigint;

-- name: CreateOutboxPartitions :one
SELECT create_outbox_partitions(@days_ahead::integer)::integer AS created;
