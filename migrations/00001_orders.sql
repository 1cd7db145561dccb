-- +goose Up
CREATE TABLE orders (
    id         uuid PRIMARY KEY, -- UUIDv7
    caller     text NOT NULL,
    user_id    text NOT NULL CHECK (char_length(user_id) BETWEEN 1 AND 64),
    amount     bigint NOT NULL CHECK (amount BETWEEN 1 AND 1000000000000), -- integer minor units
    status     text NOT NULL DEFAULT 'created' CHECK (status IN ('created')),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- +goose Down
DROP TABLE orders;
