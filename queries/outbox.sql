-- name: TakeTurn :one
-- The turn ends with the transaction.
SELECT pg_try_advisory_xact_lock(@turn::bigint);

-- name: ClaimOutboxBatch :many
-- Moves the next events, in the order of id, from the outbox to the archive, and returns them. The claim is
-- materialized: inlined below the DELETE, the LIMIT could be evaluated again and claim more. The rows are deleted by an
-- array of ids: a join, once it was planned for an empty outbox, would scan a full one.
WITH claimed AS MATERIALIZED (
    SELECT o.id FROM outbox o ORDER BY o.id LIMIT @batch_size FOR UPDATE SKIP LOCKED
), moved AS (
    DELETE FROM outbox WHERE id = ANY (ARRAY(SELECT claimed.id FROM claimed))
    RETURNING id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at
), archived AS (
    INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at)
    SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at FROM moved
)
SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at FROM moved ORDER BY id;

-- name: CreateOutboxPartitions :one
SELECT create_outbox_partitions(@days_ahead::integer)::integer AS created;
