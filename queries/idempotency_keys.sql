-- name: FindIdempotencyKeys :many
-- The limit changes nothing, but keeps the planner from joining in any other way than key by key.
SELECT held.caller, held.operation, held.key, held.fingerprint, held.order_id, held.expires_at
FROM (SELECT unnest(@callers::text[]) AS caller, unnest(@operations::text[]) AS operation, unnest(@keys::text[]) AS key) AS wanted,
     LATERAL (SELECT * FROM idempotency_keys k
              WHERE k.caller = wanted.caller AND k.operation = wanted.operation AND k.key = wanted.key
              LIMIT 1) AS held
WHERE held.expires_at > now();
