-- name: GetRelayState :one
SELECT epoch, redrive_at, redrive_id FROM relay_state WHERE one;

-- name: StartRedrive :exec
-- Notes that the broker has begun another life, and that what it may have forgotten is to be published again. In its first life
-- it has nothing to forget.
UPDATE relay_state SET redrive_at = CASE WHEN epoch <> '' THEN finished_to END, redrive_id = 0, redriven = 0, epoch = @epoch WHERE one;

-- name: MoveRedrive :exec
UPDATE relay_state SET redrive_at = @redrive_at::timestamptz, redrive_id = @redrive_id, redriven = redriven + @more WHERE one;

-- name: EndRedrive :one
-- Returns how many events were published again.
UPDATE relay_state SET redrive_at = NULL, redrive_id = 0, redriven = redriven + @more WHERE one RETURNING redriven;

-- name: FindEndOfSlice :one
-- Where so many published events, oldest first, end.
SELECT published_at, id FROM outbox_published
WHERE (published_at, id) > (@after_at::timestamptz, @after_id::bigint)
ORDER BY published_at, id OFFSET @events LIMIT 1;

-- name: FindUnfinishedEvents :many
-- Published events that the consumer has not finished, oldest first, in a slice of the archive. The state is a subquery because a
-- join might read the whole inbox for one slice.
SELECT p.published_at, p.id, p.event_id, p.aggregate_id, p.event_type, p.source, p.payload, p.traceparent, p.created_at
FROM outbox_published p
WHERE (p.published_at, p.id) > (@after_at::timestamptz, @after_id::bigint)
  AND (p.published_at, p.id) <= (@to_at::timestamptz, @to_id::bigint)
  AND COALESCE((SELECT i.state FROM inbox i WHERE i.consumer = @consumer AND i.event_id = p.event_id), 'received') = 'received'
ORDER BY p.published_at, p.id;
