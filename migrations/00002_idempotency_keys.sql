-- +goose Up
-- The primary key is the judge: at most one order for a key of a caller and an operation.
CREATE TABLE idempotency_keys (
    caller      text COLLATE "C" NOT NULL,
    operation   text COLLATE "C" NOT NULL,
    key         text COLLATE "C" NOT NULL CHECK (char_length(key) BETWEEN 1 AND 255),
    fingerprint bytea NOT NULL CHECK (octet_length(fingerprint) = 32), -- SHA-256 of the validated request
    order_id    uuid NOT NULL, -- written by the same transaction as the order
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    PRIMARY KEY (caller, operation, key)
);

-- +goose Down
DROP TABLE idempotency_keys;
