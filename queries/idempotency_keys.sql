-- name: FindIdempotencyKeys :many
SELECT digest, fingerprint, order_id, expires_at
FROM idempotency_keys
WHERE digest = ANY (@digests::uuid[]) AND expires_at > now();
