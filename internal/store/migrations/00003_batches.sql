-- +goose Up
-- Files that expire, uploads in parts, batches and the journal of their answers.
ALTER TABLE files ADD COLUMN expires_at INTEGER NOT NULL DEFAULT 0; -- Unix seconds; 0: never
CREATE INDEX files_expires_at ON files (expires_at) WHERE expires_at > 0;

CREATE TABLE uploads (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL, -- of a pending one; Unix seconds
    status     TEXT    NOT NULL, -- pending, completed, cancelled, expired
    filename   TEXT    NOT NULL,
    purpose    TEXT    NOT NULL,
    mime_type  TEXT    NOT NULL,
    bytes      INTEGER NOT NULL, -- that the file will have
    lifetime   INTEGER NOT NULL DEFAULT 0, -- of the file, seconds; 0: for ever
    file_id    TEXT    NOT NULL DEFAULT '' -- of a completed one
);
CREATE INDEX uploads_status ON uploads (status, expires_at);

-- A part's content is a blob. The rows, and blobs that nothing else has, go when the upload is no longer pending.
CREATE TABLE upload_parts (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    upload_id  TEXT    NOT NULL REFERENCES uploads (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL,
    bytes      INTEGER NOT NULL,
    sha256     TEXT    NOT NULL
);
CREATE INDEX upload_parts_upload ON upload_parts (upload_id);
CREATE INDEX upload_parts_sha256 ON upload_parts (sha256);

-- Times are Unix seconds, 0 for what has not happened.
CREATE TABLE batches (
    seq              INTEGER PRIMARY KEY AUTOINCREMENT,
    id               TEXT    NOT NULL UNIQUE,
    created_at       INTEGER NOT NULL,
    status           TEXT    NOT NULL,
    endpoint         TEXT    NOT NULL,
    input_file       TEXT    NOT NULL,
    window           TEXT    NOT NULL, -- completion_window as it was asked for
    metadata         TEXT    NOT NULL DEFAULT '', -- JSON object; empty: none was sent
    output_lifetime  INTEGER NOT NULL DEFAULT 0, -- of the output files, seconds; 0: for ever
    model            TEXT    NOT NULL DEFAULT '', -- of the first request
    errors           TEXT    NOT NULL DEFAULT '', -- JSON array of what is wrong with the input file
    output_file      TEXT    NOT NULL DEFAULT '',
    error_file       TEXT    NOT NULL DEFAULT '',
    total            INTEGER NOT NULL DEFAULT 0, -- requests
    completed        INTEGER NOT NULL DEFAULT 0,
    failed           INTEGER NOT NULL DEFAULT 0,
    usage            TEXT    NOT NULL DEFAULT '{}', -- JSON object, summed over the answers
    in_progress_at   INTEGER NOT NULL DEFAULT 0,
    expires_at       INTEGER NOT NULL,
    finalizing_at    INTEGER NOT NULL DEFAULT 0,
    completed_at     INTEGER NOT NULL DEFAULT 0,
    failed_at        INTEGER NOT NULL DEFAULT 0,
    expired_at       INTEGER NOT NULL DEFAULT 0,
    cancelling_at    INTEGER NOT NULL DEFAULT 0,
    cancelled_at     INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX batches_status ON batches (status, seq);

-- The journal: the answer to each request of an unfinished batch, as it will stand in a file. The rows go with the batch's end.
CREATE TABLE batch_answers (
    batch_id TEXT    NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
    line     INTEGER NOT NULL, -- of the request in the input file, from 1
    failed   INTEGER NOT NULL, -- 1: belongs into the error file
    content  TEXT    NOT NULL, -- one line of JSON
    PRIMARY KEY (batch_id, line)
) WITHOUT ROWID;
