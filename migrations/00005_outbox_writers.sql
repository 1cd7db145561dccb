-- +goose Up
-- The transactions that write to the outbox, as virtual transaction ids. Who inserts locks the table before it is given an id,
-- and lets go after its rows can be seen: an id that was given out, and is neither seen nor held by one of these, never will be.
CREATE FUNCTION outbox_writers() RETURNS text[]
LANGUAGE sql STABLE AS $$
    SELECT array_agg(virtualtransaction) FROM pg_locks
    WHERE relation = 'outbox'::regclass AND mode = 'RowExclusiveLock' AND granted
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
$$;

-- +goose Down
DROP FUNCTION outbox_writers();
