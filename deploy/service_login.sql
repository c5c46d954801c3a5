-- The login of the service, for PostgreSQL with or without a connection pooler before it.
--
-- Run it once, after `tallygate migrate`, as the login that migrates, and give it a password:
--
--     psql "$MIGRATION_URL" -f deploy/service_login.sql -c '\password tallygate_service'
--
-- It may read, and write through the functions of the schema alone. What follows is what the service
-- sets for itself on a connection of its own; a transaction pooler keeps nothing that a session
-- sets, so there the login has to bring it along, and `tallygate serve` refuses one that does not.

CREATE ROLE tallygate_service LOGIN IN ROLE tallygate_app;
ALTER ROLE tallygate_service SET search_path = tallygate, pg_temp;
-- A statement that was given up must not go on waiting for a lock and then be carried out. The
-- service gives up after 5 s what a customer waits for, and after 30 s everything else.
ALTER ROLE tallygate_service SET lock_timeout = '4500ms';
ALTER ROLE tallygate_service SET statement_timeout = '27s';
ALTER ROLE tallygate_service SET idle_in_transaction_session_timeout = '30s';
ALTER ROLE tallygate_service SET client_connection_check_interval = '2s';
