-- +goose Up
-- What requests with an Idempotency-Key have made: a row comes with the object, in one transaction.
CREATE TABLE idempotency_keys (
    key        TEXT    PRIMARY KEY, -- digest of who sent it and of the header
    request    TEXT    NOT NULL, -- digest of what was asked for
    object_id  TEXT    NOT NULL,
    expires_at INTEGER NOT NULL -- Unix seconds
) WITHOUT ROWID;
CREATE INDEX idempotency_keys_expires_at ON idempotency_keys (expires_at);
