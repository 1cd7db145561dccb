-- name: BeginOperation :one
INSERT INTO operations (who, what, events) VALUES (@who, @what, 0) RETURNING id;

-- name: CountOperation :exec
UPDATE operations SET events = events + @events::bigint WHERE id = @id;

-- name: WaitForTurn :exec
-- The turn ends with the transaction.
SELECT pg_advisory_xact_lock(@turn::bigint);

-- name: FindDead :many
-- Events that were refused for good, by the broker (consumer is empty) or by a consumer, and that nobody has dropped; first those
-- that died first. One that the archive has no longer has no order and no type, and was published at 'epoch'.
WITH dead AS (
    SELECT ''::text AS consumer, d.id, d.event_id, d.aggregate_id, d.event_type, d.attempts, d.reason, d.died_at,
           'epoch'::timestamptz AS published_at
    FROM outbox_dead d
    UNION ALL
    SELECT i.consumer, COALESCE(p.id, 0), i.event_id, COALESCE(p.aggregate_id, '00000000-0000-0000-0000-000000000000'::uuid),
           COALESCE(p.event_type, ''), 0, COALESCE(i.reason, ''), i.finished_at, COALESCE(p.published_at, 'epoch')
    FROM inbox i LEFT JOIN outbox_published p ON p.event_id = i.event_id
    WHERE i.state = 'dead' AND i.reason NOT LIKE 'dropped: %'
)
SELECT dead.consumer::text AS consumer, dead.id, dead.event_id, dead.aggregate_id, dead.event_type, dead.attempts, dead.reason, dead.died_at::timestamptz AS died_at,
       dead.published_at::timestamptz AS published_at
FROM dead
WHERE dead.died_at <= now() - @older_than::interval
  AND (cardinality(@event_ids::uuid[]) = 0 OR dead.event_id = ANY (@event_ids::uuid[]))
  AND (@aggregate_id::uuid = '00000000-0000-0000-0000-000000000000' OR dead.aggregate_id = @aggregate_id::uuid)
  AND (@event_type::text = '' OR dead.event_type = @event_type::text)
ORDER BY dead.died_at, dead.event_id LIMIT @most::bigint;

-- name: FindDeadAtBroker :many
SELECT id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at FROM outbox_dead WHERE id = ANY (@ids::bigint[]);

-- name: RequeueDead :execrows
-- Moves dead events to the end of the outbox, in the order they had.
WITH moved AS (
    DELETE FROM outbox_dead WHERE id = ANY (@ids::bigint[])
    RETURNING id, event_id, aggregate_id, event_type, source, payload, traceparent, created_at
)
INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload, traceparent, created_at)
SELECT event_id, aggregate_id, event_type, source, payload, traceparent, created_at FROM moved ORDER BY id;

-- name: DropDead :execrows
DELETE FROM outbox_dead WHERE id = ANY (@ids::bigint[]);

-- name: LockDeadToConsumers :many
-- Of these events, those that are dead to these consumers still. All lock in the same order.
SELECT i.consumer, i.event_id FROM inbox i
WHERE i.state = 'dead' AND (i.consumer, i.event_id) IN (SELECT unnest(@consumers::text[]), unnest(@event_ids::uuid[]))
ORDER BY i.consumer, i.event_id FOR UPDATE OF i;

-- name: ReopenDeadToConsumers :execrows
-- As if their receivers had abandoned them: the next delivery is entered, and until then they are not finished.
UPDATE inbox i SET state = 'received', received_at = 'epoch', finished_at = NULL, reason = NULL
WHERE i.state = 'dead' AND (i.consumer, i.event_id) IN (SELECT unnest(@consumers::text[]), unnest(@event_ids::uuid[]));

-- name: DropDeadToConsumers :execrows
-- The rows stay and stay dead, or the events would be new to their consumers; the reason tells that they were dropped.
UPDATE inbox i SET reason = 'dropped: ' || i.reason
WHERE i.state = 'dead' AND i.reason NOT LIKE 'dropped: %'
  AND (i.consumer, i.event_id) IN (SELECT unnest(@consumers::text[]), unnest(@event_ids::uuid[]));

-- name: FindPublishedEvents :many
SELECT p.published_at, p.id, p.event_id, p.aggregate_id, p.event_type, p.source, p.payload, p.traceparent, p.created_at, now()::timestamptz AS replayed_at
FROM outbox_published p
WHERE (p.published_at, p.id) IN (SELECT unnest(@published_ats::timestamptz[]), unnest(@ids::bigint[]))
ORDER BY p.published_at, p.id;

-- name: LowerFinished :exec
-- An event that was published then is not finished any more. The mark is moved in any case: a sweep that saw the event finished, and
-- is about to move the mark past it, finds that somebody else did.
UPDATE relay_state SET finished_to = LEAST(finished_to, @published_at::timestamptz) - interval '1 microsecond' WHERE one;

-- name: CountPublishedEvents :one
SELECT count(*) FROM outbox_published p
WHERE (p.published_at, p.id) > (@from_at::timestamptz, @after_id::bigint) AND p.published_at < @to_at::timestamptz
  AND (@aggregate_id::uuid = '00000000-0000-0000-0000-000000000000' OR p.aggregate_id = @aggregate_id::uuid)
  AND (@event_type::text = '' OR p.event_type = @event_type::text);

-- name: FindPublishedBetween :many
-- Published events, oldest first, after those that were looked at before.
SELECT p.published_at, p.id, p.event_id, p.aggregate_id, p.event_type, p.source, p.payload, p.traceparent, p.created_at, now()::timestamptz AS replayed_at
FROM outbox_published p
WHERE (p.published_at, p.id) > (@from_at::timestamptz, @after_id::bigint) AND p.published_at < @to_at::timestamptz
  AND (@aggregate_id::uuid = '00000000-0000-0000-0000-000000000000' OR p.aggregate_id = @aggregate_id::uuid)
  AND (@event_type::text = '' OR p.event_type = @event_type::text)
ORDER BY p.published_at, p.id LIMIT @batch_size::bigint;

-- name: ForceInbox :exec
-- Takes back that the consumer finished these events, if that was before they were replayed: they are as if their receivers had
-- abandoned them. One that was finished since stays so: the replay was delivered twice. None of them was published before the given
-- time: should the broker forget them now, they are published again (as in LowerFinished).
-- The rows are locked in order, and the mark last: two consumers must not wait for each other in a circle.
WITH forced AS (
    SELECT unnest(@event_ids::uuid[]) AS event_id, unnest(@replayed_ats::timestamptz[]) AS replayed_at
), locked AS MATERIALIZED (
    SELECT i.event_id FROM inbox i JOIN forced USING (event_id)
    WHERE i.consumer = @consumer AND i.state <> 'received' AND i.finished_at < forced.replayed_at
    ORDER BY i.event_id FOR UPDATE OF i
), opened AS (
    UPDATE inbox i SET state = 'received', received_at = 'epoch', finished_at = NULL, reason = NULL
    WHERE i.consumer = @consumer AND i.event_id = ANY (ARRAY(SELECT locked.event_id FROM locked))
    RETURNING i.event_id
)
UPDATE relay_state SET finished_to = LEAST(finished_to, @published_since::timestamptz) - interval '1 microsecond'
WHERE one AND (SELECT count(*) FROM opened) > 0;

-- name: CountWaiting :one
-- How many events of an order wait to be published, and whether it is parked.
SELECT ((SELECT count(*) FROM outbox o WHERE o.aggregate_id = @aggregate_id::uuid)
      + (SELECT count(*) FROM outbox_held h WHERE h.aggregate_id = @aggregate_id::uuid))::bigint AS events,
       EXISTS (SELECT FROM outbox_parked k WHERE k.aggregate_id = @aggregate_id::uuid) AS parked;

-- name: FindParked :many
-- The parked orders, first those that were parked first, and how many events of each wait to be published.
SELECT k.aggregate_id, k.parked_at, COALESCE(w.events, 0)::bigint AS events
FROM outbox_parked k LEFT JOIN (
    SELECT e.aggregate_id, count(*) AS events
    FROM (SELECT aggregate_id FROM outbox UNION ALL SELECT aggregate_id FROM outbox_held) AS e
    WHERE e.aggregate_id IN (SELECT aggregate_id FROM outbox_parked) GROUP BY e.aggregate_id
) AS w ON w.aggregate_id = k.aggregate_id
ORDER BY k.parked_at, k.aggregate_id LIMIT @most::bigint;

-- name: ParkOrder :execrows
INSERT INTO outbox_parked (aggregate_id) VALUES (@aggregate_id) ON CONFLICT DO NOTHING;

-- name: UnparkOrder :execrows
DELETE FROM outbox_parked WHERE aggregate_id = @aggregate_id;

-- name: ReleaseOrder :exec
-- Lets the first event that is held back of the order be tried now.
UPDATE outbox_held SET next_attempt_at = now()
WHERE id = (SELECT min(h.id) FROM outbox_held h WHERE h.aggregate_id = @aggregate_id);
