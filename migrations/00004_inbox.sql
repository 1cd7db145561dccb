-- +goose Up
-- What a consumer has received and what it has finished. A received event belongs to its holder until it is finished or
-- abandoned; a second delivery finds it here.
CREATE TABLE inbox (
    consumer    text COLLATE "C" NOT NULL,
    event_id    uuid NOT NULL,
    state       text NOT NULL CHECK (state IN ('received', 'sent', 'dead')),
    holder      uuid NOT NULL, -- the batch that received it last; every later write asks for it
    received_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz CHECK ((finished_at IS NULL) = (state = 'received')),
    PRIMARY KEY (consumer, event_id)
);

-- +goose Down
DROP TABLE inbox;
