-- name: EnterInbox :many
-- Receives each event that is new, or that its last holder abandoned, or that this holder has already, as when the reply
-- was lost, and returns those: they are the holder's to send. No event may stand twice in a batch, and all batches must be
-- in the same order, or two of them may deadlock.
INSERT INTO inbox AS held (consumer, event_id, state, holder)
SELECT @consumer::text, unnest(@event_ids::uuid[]), 'received', @holder::uuid
ON CONFLICT (consumer, event_id) DO UPDATE
SET holder = excluded.holder, received_at = excluded.received_at
WHERE held.state = 'received'
  AND (held.holder = excluded.holder OR held.received_at <= now() - @abandoned_after::interval)
RETURNING event_id;

-- name: FindFinished :many
-- Of these events, those that need nothing more.
SELECT event_id FROM inbox
WHERE consumer = @consumer AND event_id = ANY(@event_ids::uuid[]) AND state <> 'received';

-- name: MarkSent :many
-- Finishes the events that this holder still holds, and returns those.
UPDATE inbox SET state = 'sent', finished_at = now()
WHERE consumer = @consumer AND event_id = ANY(@event_ids::uuid[]) AND holder = @holder AND state = 'received'
RETURNING event_id;
