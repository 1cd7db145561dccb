-- name: TakeSweep :one
-- Whose turn it is to sweep; until the session ends, or EndSweep.
SELECT pg_try_advisory_lock(@sweep::bigint) AS taken;

-- name: EndSweep :exec
SELECT pg_advisory_unlock(@sweep::bigint);

-- name: GetFinishedTo :one
-- The mark, and how far it may be moved: not to the last minute, in which a relay may still be committing.
SELECT finished_to, (now() - interval '1 minute')::timestamptz AS settled FROM relay_state;

-- name: LookAtPublished :many
-- The next events of the archive, and whether the consumer has finished each. The first condition lets whole days be passed over.
SELECT p.published_at, p.id,
       (COALESCE((SELECT i.state FROM inbox i WHERE i.consumer = @consumer AND i.event_id = p.event_id), 'received') <> 'received')::boolean AS finished
FROM outbox_published p
WHERE p.published_at >= @after_at::timestamptz AND (p.published_at, p.id) > (@after_at::timestamptz, @after_id::bigint)
  AND p.published_at < @before::timestamptz
ORDER BY p.published_at, p.id LIMIT @batch_size;

-- name: MoveFinishedTo :exec
-- Moves the mark, unless somebody else did meanwhile.
UPDATE relay_state SET finished_to = @finished_to WHERE finished_to = @was;

-- name: FindOldDay :many
-- The end of the oldest day of the archive, when it is older than the retention and everything before its end is finished.
SELECT d.ends::timestamptz AS ends
FROM (SELECT outbox_oldest_day_ends() AS ends) AS d, relay_state s
WHERE d.ends <= LEAST(s.finished_to, now() - @retention::interval);

-- name: ExpireDay :one
SELECT expire_outbox_day(@ends::timestamptz, @turn::bigint)::text AS name;

-- name: ExpireRest :one
SELECT expire_outbox_rest(LEAST(s.finished_to, now() - @retention::interval), @consumer::text, @batch_size::integer)::integer AS events
FROM relay_state s;

-- name: FindExpired :many
-- The table that left the archive first, if that is long enough ago.
SELECT name, expired_at, table_pages(name)::bigint AS pages FROM outbox_expired
WHERE expired_at <= now() - @grace::interval ORDER BY expired_at LIMIT 1;

-- name: ForgetExpired :one
SELECT forget_expired_events(@name::text, @consumer::text, @first_page::bigint, @pages::integer)::integer AS events;

-- name: DropExpired :exec
SELECT drop_expired_events(@name::text);

-- name: CountKeyPages :one
SELECT table_pages('idempotency_keys')::bigint AS pages;

-- name: DeleteExpiredKeys :one
SELECT delete_expired_keys(@first_page::bigint, @pages::integer)::integer AS keys;

-- name: FindOldestPending :many
-- The oldest event in the outbox, from the given id on, and the oldest of those held back that no operator parked.
(SELECT o.id, o.created_at, false AS held FROM outbox o WHERE o.id >= @from_id ORDER BY o.id LIMIT 1)
UNION ALL
(SELECT h.id, h.created_at, true AS held FROM outbox_held h
 WHERE NOT EXISTS (SELECT FROM outbox_parked k WHERE k.aggregate_id = h.aggregate_id) ORDER BY h.id LIMIT 1);
