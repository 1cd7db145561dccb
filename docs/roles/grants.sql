-- What the server and the worker may do: see roles.sql. Run it as orders_migration after each migration; it can be repeated.
BEGIN;

REVOKE ALL ON ALL TABLES IN SCHEMA public FROM PUBLIC, orders_server;
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC, orders_server;

-- The server writes keys, orders and events, and reads no event.
GRANT SELECT ON goose_db_version TO orders_server;
GRANT SELECT, INSERT, UPDATE (fingerprint, order_id, created_at, expires_at) ON idempotency_keys TO orders_server;
GRANT SELECT, INSERT ON orders TO orders_server;
GRANT SELECT (id, created_at), INSERT ON outbox TO orders_server;
GRANT SELECT (id, aggregate_id, created_at) ON outbox_held TO orders_server;
GRANT SELECT (aggregate_id) ON outbox_parked TO orders_server;

-- The worker moves events, and sees no order. To lock a row, it must be allowed to update some column of it.
GRANT SELECT ON goose_db_version, outbox_parked TO orders_worker;
GRANT SELECT, UPDATE (id), DELETE ON outbox TO orders_worker;
GRANT SELECT ON SEQUENCE outbox_id_seq TO orders_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_held, inbox TO orders_worker;
GRANT INSERT ON outbox_dead TO orders_worker;
GRANT SELECT, UPDATE ON relay_state TO orders_worker;
GRANT SELECT, UPDATE (expires_at), DELETE ON idempotency_keys TO orders_worker;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO orders_worker; -- they do what the caller may

-- The archive is the worker's.
DO $$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')
                AND relname ~ '^outbox_(published|expired)' AND relowner <> 'orders_worker'::regrole LOOP
        EXECUTE format('ALTER TABLE %I OWNER TO orders_worker', name);
    END LOOP;
END
$$;

COMMIT;
