-- name: InsertIdempotencyKeys :many
-- Takes each key that is free or has expired, and returns a row for each it took. A key without a row belongs to a
-- committed send; one that another transaction is writing is waited for. No key may stand twice in a batch, and all
-- batches must be in the same order, or two of them may deadlock.
INSERT INTO idempotency_keys AS held (caller, operation, key, fingerprint, order_id, expires_at)
SELECT unnest(@callers::text[]), unnest(@operations::text[]), unnest(@keys::text[]), unnest(@fingerprints::bytea[]),
       unnest(@order_ids::uuid[]), now() + @retention::interval
ON CONFLICT (caller, operation, key) DO UPDATE
SET fingerprint = excluded.fingerprint, order_id = excluded.order_id,
    created_at = excluded.created_at, expires_at = excluded.expires_at
WHERE held.expires_at <= now()
RETURNING order_id, created_at, expires_at;

-- name: FindIdempotencyKeys :many
SELECT k.caller, k.operation, k.key, k.fingerprint, k.order_id, k.created_at, k.expires_at
FROM (SELECT unnest(@callers::text[]) AS caller, unnest(@operations::text[]) AS operation, unnest(@keys::text[]) AS key) AS wanted
JOIN idempotency_keys k ON k.caller = wanted.caller AND k.operation = wanted.operation AND k.key = wanted.key
WHERE k.expires_at > now();
