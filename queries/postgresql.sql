-- name: IsStandby :one
-- A standby can be read, and nothing can be placed on it.
SELECT pg_is_in_recovery();
