-- The three roles of the program, with no more than each needs. Run this once in the program's own database, as its owner or a
-- superuser, before the first migration; then set passwords:
--
--   psql -d outbox_db -f docs/roles/roles.sql
--   psql -d outbox_db -c '\password orders_server'   # and orders_worker, orders_migration
--   DB_USER=orders_migration DB_PASSWORD=... idempotent-orders migrate up
--   psql -d outbox_db -U orders_migration -f docs/roles/grants.sql   # again after each migration
--
-- Then `server` runs with DB_USER=orders_server, `worker` and `consumer` with orders_worker. Operators (`events`, `reconcile`) use
-- orders_migration.
CREATE ROLE orders_server LOGIN;
CREATE ROLE orders_worker LOGIN;
CREATE ROLE orders_migration LOGIN IN ROLE orders_worker; -- the worker owns the archive, whose days it makes and drops

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO orders_server;
GRANT USAGE, CREATE ON SCHEMA public TO orders_worker, orders_migration;
