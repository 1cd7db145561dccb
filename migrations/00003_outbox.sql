-- +goose Up
-- What waits to be published, and nothing else: its count is the backlog.
CREATE TABLE outbox (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id     uuid NOT NULL, -- UUIDv7, unique for ever
    aggregate_id uuid NOT NULL, -- the order; events of one order are published in the order of id
    event_type   text NOT NULL,
    source       text NOT NULL,
    payload      json NOT NULL, -- the event's data, published as it stands
    traceparent  text,
    created_at   timestamptz NOT NULL DEFAULT now()
);

-- The archive of what was published, a partition a day.
CREATE TABLE outbox_published (
    id           bigint NOT NULL,
    event_id     uuid NOT NULL,
    aggregate_id uuid NOT NULL,
    event_type   text NOT NULL,
    source       text NOT NULL,
    payload      json NOT NULL,
    traceparent  text,
    created_at   timestamptz NOT NULL,
    published_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (published_at, id)
) PARTITION BY RANGE (published_at);

-- Catches what no day's partition takes, so that publishing never waits for a partition to be made.
CREATE TABLE outbox_published_default PARTITION OF outbox_published DEFAULT;

-- Makes the partitions of today and of the given number of days after it (in UTC); those that exist stay. A day whose
-- rows already stand in the default partition keeps them there. Safe to call from many sessions at once.
--
-- A partition is made on its own and then attached, which lets publishing go on; only the default partition is locked
-- against readers, and not waited for longer than lock_timeout: then the call fails, and can be repeated.
-- +goose StatementBegin
CREATE FUNCTION create_outbox_partitions(days_ahead integer) RETURNS integer
LANGUAGE plpgsql
SET lock_timeout = '1s' SET datestyle = 'ISO' SET timezone = 'UTC' AS $$
DECLARE
    today   date := (now() AT TIME ZONE 'UTC')::date;
    day     date;
    name    text;
    created integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('create_outbox_partitions'));
    FOR day IN SELECT generate_series(today, today + days_ahead, '1 day')::date LOOP
        name := 'outbox_published_' || to_char(day, 'YYYYMMDD');
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        CONTINUE WHEN EXISTS (SELECT FROM outbox_published_default
                              WHERE published_at >= day::timestamptz AND published_at < (day + 1)::timestamptz);
        EXECUTE format('CREATE TABLE %I (LIKE outbox_published INCLUDING ALL)', name);
        EXECUTE format('ALTER TABLE outbox_published ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                       name, day::timestamptz, (day + 1)::timestamptz);
        created := created + 1;
    END LOOP;
    RETURN created;
END
$$;
-- +goose StatementEnd

SELECT create_outbox_partitions(7);

-- +goose Down
DROP FUNCTION create_outbox_partitions(integer);
DROP TABLE outbox_published;
DROP TABLE outbox;
