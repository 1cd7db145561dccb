-- name: GetRelayState :one
SELECT epoch, redrive_at, redrive_id FROM relay_state;

-- name: StartRedrive :exec
-- Notes that the broker has begun another life, and that what it may have forgotten is to be published again. In its first life
-- it has nothing to forget.
UPDATE relay_state SET redrive_at = CASE WHEN epoch <> '' THEN finished_to END, redrive_id = 0, epoch = @epoch;

-- name: MoveRedrive :exec
UPDATE relay_state SET redrive_at = @redrive_at::timestamptz, redrive_id = @redrive_id;

-- name: EndRedrive :exec
UPDATE relay_state SET redrive_at = NULL, redrive_id = 0;

-- name: FindUnfinishedEvents :many
-- Published events that the consumer has not finished, oldest first, after those that were looked at before. The state is a
-- subquery because a join might read the whole inbox for one batch.
SELECT p.published_at, p.id, p.event_id, p.aggregate_id, p.event_type, p.source, p.payload, p.traceparent, p.created_at
FROM outbox_published p
WHERE (p.published_at, p.id) > (@after_at::timestamptz, @after_id::bigint)
  AND COALESCE((SELECT i.state FROM inbox i WHERE i.consumer = @consumer AND i.event_id = p.event_id), 'received') = 'received'
ORDER BY p.published_at, p.id LIMIT @batch_size;

-- name: AdvanceFinished :one
-- Moves the mark before which every published event is finished, as far as the first that is not, and not to the last minute,
-- in which a relay may still be committing. Returns the mark.
UPDATE relay_state s SET finished_to = GREATEST(s.finished_to, LEAST(now() - interval '1 minute', COALESCE((
    SELECT p.published_at FROM outbox_published p
    WHERE p.published_at >= s.finished_to
      AND COALESCE((SELECT i.state FROM inbox i WHERE i.consumer = @consumer AND i.event_id = p.event_id), 'received') = 'received'
    ORDER BY p.published_at, p.id LIMIT 1), now())))
RETURNING finished_to;
