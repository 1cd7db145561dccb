-- name: InsertOutboxEvents :exec
-- An empty traceparent is stored as NULL.
INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload, traceparent)
SELECT unnest(@event_ids::uuid[]), unnest(@aggregate_ids::uuid[]), unnest(@event_types::text[]), unnest(@sources::text[]),
       unnest(@payloads::json[]), NULLIF(unnest(@traceparents::text[]), '');

-- name: TakeTurn :one
-- The turn ends with the transaction, also when PostgreSQL ends it because the holder left it idle for stall_timeout.
SELECT set_config('idle_in_transaction_session_timeout', @stall_timeout::text, true)::text AS stall_timeout,
       pg_try_advisory_xact_lock(@turn::bigint) AS taken;

-- name: ClaimOutboxBatch :many
-- Moves the next events, in the order of id, from the outbox to the archive, and returns them. The claim is
-- materialized: inlined below the DELETE, the LIMIT could be evaluated again and claim more.
WITH claimed AS MATERIALIZED (
    SELECT o.id FROM outbox o ORDER BY o.id LIMIT @batch_size FOR UPDATE SKIP LOCKED
), moved AS (
    DELETE FROM outbox USING claimed WHERE outbox.id = claimed.id
    RETURNING outbox.id, outbox.event_id, outbox.aggregate_id, outbox.event_type, outbox.source, outbox.payload,
              outbox.traceparent, outbox.created_at
), archived AS (
    INSERT INTO outbox_published (id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at)
    SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at FROM moved
)
SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at FROM moved ORDER BY id;

-- name: CreateOutboxPartitions :one
SELECT create_outbox_partitions(@days_ahead::integer)::integer AS created;
