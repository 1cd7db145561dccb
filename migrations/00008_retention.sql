-- +goose Up
-- What left the archive and is still on disk. Its events can be delivered again until the stream is trimmed, and so they stay in
-- the inbox; then they leave the inbox, and the table is dropped.
CREATE TABLE outbox_expired (
    name       text PRIMARY KEY, -- of the table, which has the columns of the archive
    expired_at timestamptz NOT NULL DEFAULT now()
);

-- The end of the oldest day of the archive; NULL when it has none but the default partition.
-- +goose StatementBegin
CREATE FUNCTION outbox_oldest_day_ends() RETURNS timestamptz
LANGUAGE sql STABLE SET datestyle = 'ISO' SET timezone = 'UTC' AS $$
    SELECT min(substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \(''([^'']+)''\)')::timestamptz)
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'outbox_published'::regclass
$$;
-- +goose StatementEnd

-- Takes the day that ends then out of the archive, which nobody may use at that moment. It takes the relays' turn first, so that
-- none is at work there; and it does not wait for those who read there, since others would wait behind it. When it fails by
-- lock_timeout, it can be repeated. (With a default partition nothing can be detached concurrently.)
-- +goose StatementBegin
CREATE FUNCTION expire_outbox_day(ends timestamptz, turn bigint) RETURNS text
LANGUAGE plpgsql SET lock_timeout = '5s' SET datestyle = 'ISO' SET timezone = 'UTC' AS $$
DECLARE
    day  text;
    name text;
BEGIN
    PERFORM pg_advisory_xact_lock(turn);
    PERFORM set_config('lock_timeout', '100ms', true);
    SELECT c.relname, 'outbox_expired_' || to_char(ends - interval '1 day', 'YYYYMMDD') INTO STRICT day, name
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent = 'outbox_published'::regclass
      AND substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \(''([^'']+)''\)')::timestamptz = ends;
    EXECUTE format('ALTER TABLE outbox_published DETACH PARTITION %I', day);
    EXECUTE format('ALTER TABLE %I RENAME TO %I', day, name);
    INSERT INTO outbox_expired VALUES (name);
    RETURN name;
END
$$;
-- +goose StatementEnd

-- Takes up to so many events that were published before then, and that the consumer has finished, out of the default partition.
-- Returns how many.
-- +goose StatementBegin
CREATE FUNCTION expire_outbox_rest(published_before timestamptz, finished_by text, batch_size integer) RETURNS integer
LANGUAGE plpgsql SET lock_timeout = '100ms' AS $$
DECLARE
    moved integer;
BEGIN
    IF NOT EXISTS (SELECT FROM outbox_published_default WHERE published_at < published_before) THEN
        RETURN 0;
    END IF;
    IF to_regclass('outbox_expired_rest') IS NULL THEN
        CREATE TABLE outbox_expired_rest (LIKE outbox_published);
        INSERT INTO outbox_expired VALUES ('outbox_expired_rest');
    END IF;
    WITH gone AS (
        DELETE FROM outbox_published_default WHERE ctid = ANY (ARRAY(
            SELECT d.ctid FROM outbox_published_default d
            WHERE d.published_at < published_before
              AND EXISTS (SELECT FROM inbox i WHERE i.consumer = finished_by AND i.event_id = d.event_id AND i.state <> 'received')
            ORDER BY d.published_at, d.id LIMIT batch_size FOR UPDATE OF d SKIP LOCKED))
        RETURNING *
    )
    INSERT INTO outbox_expired_rest SELECT * FROM gone;
    GET DIAGNOSTICS moved = ROW_COUNT;
    UPDATE outbox_expired SET expired_at = now() WHERE name = 'outbox_expired_rest' AND moved > 0;
    RETURN moved;
END
$$;
-- +goose StatementEnd

-- Deletes from the inbox what a consumer finished of the events on some pages of a table that left the archive. Returns how many.
-- +goose StatementBegin
CREATE FUNCTION forget_expired_events(name text, consumer text, first_page bigint, pages integer) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    deleted integer;
BEGIN
    EXECUTE format('DELETE FROM inbox WHERE consumer = $1 AND state <> ''received'' AND event_id = ANY (ARRAY(
                        SELECT event_id FROM %I WHERE ctid >= $2 AND ctid < $3))', name)
    USING consumer, format('(%s,0)', first_page)::tid, format('(%s,0)', first_page + pages)::tid;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END
$$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE FUNCTION drop_expired_events(expired text) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '100ms' AS $$
BEGIN
    EXECUTE format('DROP TABLE IF EXISTS %I', expired);
    DELETE FROM outbox_expired WHERE outbox_expired.name = expired;
END
$$;
-- +goose StatementEnd

-- Deletes the keys on some pages of the table that expired more than a minute ago; those that somebody is writing are left for
-- another time. Returns how many. The table is read as it lies on disk: an index on expires_at would have to be written with
-- each order.
-- +goose StatementBegin
CREATE FUNCTION delete_expired_keys(first_page bigint, pages integer) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    deleted integer;
BEGIN
    DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM idempotency_keys
        WHERE ctid >= format('(%s,0)', first_page)::tid AND ctid < format('(%s,0)', first_page + pages)::tid
          AND expires_at <= now() - interval '1 minute'
        FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END
$$;
-- +goose StatementEnd

-- How many pages of 8 KiB a table has; 0 for one that is not there.
-- +goose StatementBegin
CREATE FUNCTION table_pages(name text) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT coalesce(pg_relation_size(to_regclass(quote_ident(name))) / current_setting('block_size')::bigint, 0)
$$;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION table_pages(text);
DROP FUNCTION delete_expired_keys(bigint, integer);
DROP FUNCTION drop_expired_events(text);
DROP FUNCTION forget_expired_events(text, text, bigint, integer);
DROP FUNCTION expire_outbox_rest(timestamptz, text, integer);
DROP FUNCTION expire_outbox_day(timestamptz, bigint);
DROP FUNCTION outbox_oldest_day_ends();
-- +goose StatementBegin
DO $$
DECLARE
    expired text;
BEGIN
    FOR expired IN SELECT name FROM outbox_expired LOOP
        EXECUTE format('DROP TABLE IF EXISTS %I', expired);
    END LOOP;
END
$$;
-- +goose StatementEnd
DROP TABLE outbox_expired;
