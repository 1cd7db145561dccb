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

-- name: MarkDead :many
-- Finishes events that can never be sent, each with its reason, as far as this holder still holds them, and returns those.
UPDATE inbox i SET state = 'dead', finished_at = now(), reason = d.reason
FROM (SELECT unnest(@event_ids::uuid[]) AS event_id, unnest(@reasons::text[]) AS reason) AS d
WHERE i.consumer = @consumer AND i.event_id = d.event_id AND i.holder = @holder AND i.state = 'received'
RETURNING i.event_id;

-- name: LeaveInbox :exec
-- Forgets that this holder received events that it has not finished: the next that receives them need not wait.
DELETE FROM inbox WHERE consumer = @consumer AND event_id = ANY(@event_ids::uuid[]) AND holder = @holder AND state = 'received';
