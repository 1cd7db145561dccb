-- name: PlaceOrders :many
-- Places a batch of orders: takes each key that is free or has expired, and writes an order and its outbox event for each
-- key it took. Returns those. A key without a row belongs to a committed send; one that another transaction is writing is
-- waited for. No key may stand twice in a batch, and all batches must be in the same order of digests, or two of them may
-- deadlock. An empty traceparent is stored as NULL.
WITH sent AS MATERIALIZED (
    SELECT unnest(@digests::uuid[]) AS digest, unnest(@callers::text[]) AS caller, unnest(@operations::text[]) AS operation,
           unnest(@keys::text[]) AS key, unnest(@fingerprints::bytea[]) AS fingerprint, unnest(@order_ids::uuid[]) AS order_id,
           unnest(@user_ids::text[]) AS user_id, unnest(@amounts::bigint[]) AS amount, unnest(@event_ids::uuid[]) AS event_id,
           unnest(@payloads::json[]) AS payload, unnest(@traceparents::text[]) AS traceparent
), taken AS (
    INSERT INTO idempotency_keys AS held (digest, caller, operation, key, fingerprint, order_id, expires_at)
    SELECT digest, caller, operation, key, fingerprint, order_id, now() + @retention::interval FROM sent
    ON CONFLICT (digest) DO UPDATE
    SET fingerprint = excluded.fingerprint, order_id = excluded.order_id,
        created_at = excluded.created_at, expires_at = excluded.expires_at
    WHERE held.expires_at <= now()
    RETURNING order_id, expires_at
), placed AS (
    INSERT INTO orders (id, caller, user_id, amount, created_at)
    SELECT order_id, caller, user_id, amount, @created_at::timestamptz FROM sent JOIN taken USING (order_id)
), announced AS (
    INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload, traceparent, created_at)
    SELECT event_id, order_id, @event_type::text, @source::text, payload, NULLIF(traceparent, ''), @created_at
    FROM sent JOIN taken USING (order_id)
)
SELECT order_id, expires_at FROM taken;

-- name: GetOrder :one
SELECT id, caller, user_id, amount, status, created_at
FROM orders
WHERE id = @id AND caller = @caller;
