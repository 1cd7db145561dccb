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
-- +goose StatementBegin
CREATE FUNCTION create_outbox_partitions(days_ahead integer) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    today   date := (now() AT TIME ZONE 'UTC')::date;
    day     date;
    created integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('create_outbox_partitions'));
    FOR day IN SELECT generate_series(today, today + days_ahead, '1 day')::date LOOP
        CONTINUE WHEN to_regclass(format('outbox_published_%s', to_char(day, 'YYYYMMDD'))) IS NOT NULL;
        CONTINUE WHEN EXISTS (SELECT FROM outbox_published_default
                              WHERE published_at >= day::timestamp AT TIME ZONE 'UTC'
                                AND published_at < (day + 1)::timestamp AT TIME ZONE 'UTC');
        EXECUTE format('CREATE TABLE outbox_published_%s PARTITION OF outbox_published FOR VALUES FROM (%L) TO (%L)',
                       to_char(day, 'YYYYMMDD'), day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC');
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
