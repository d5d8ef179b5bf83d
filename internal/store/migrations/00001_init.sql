-- +goose Up
-- seq orders rows by creation: created_at has whole seconds, as in the API.
CREATE TABLE files (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    filename   TEXT    NOT NULL,
    purpose    TEXT    NOT NULL,
    bytes      INTEGER NOT NULL,
    sha256     TEXT    NOT NULL
);
CREATE INDEX files_sha256 ON files (sha256);

CREATE TABLE jobs (
    seq             INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT    NOT NULL UNIQUE,
    created_at      INTEGER NOT NULL,
    finished_at     INTEGER NOT NULL DEFAULT 0,
    status          TEXT    NOT NULL,
    attempt         INTEGER NOT NULL DEFAULT 0, -- fences the writes of earlier attempts
    failures        INTEGER NOT NULL DEFAULT 0, -- attempts in a row that ended without getting further
    saved_step      INTEGER NOT NULL DEFAULT 0, -- of the newest resume state
    model           TEXT    NOT NULL,
    base_digest     TEXT    NOT NULL,
    training_file   TEXT    NOT NULL,
    validation_file TEXT    NOT NULL DEFAULT '',
    suffix          TEXT    NOT NULL DEFAULT '',
    seed            INTEGER NOT NULL,
    method          TEXT    NOT NULL,
    adapter_id      TEXT    NOT NULL UNIQUE,
    adapter_name    TEXT    NOT NULL UNIQUE,
    requested       TEXT    NOT NULL, -- JSON, as are the next four
    options         TEXT    NOT NULL,
    metadata        TEXT    NOT NULL DEFAULT '{}',
    plan            TEXT    NOT NULL DEFAULT '',
    result_files    TEXT    NOT NULL DEFAULT '[]',
    fine_tuned_model TEXT   NOT NULL DEFAULT '',
    error_code      TEXT    NOT NULL DEFAULT '',
    error_message   TEXT    NOT NULL DEFAULT '',
    error_param     TEXT    NOT NULL DEFAULT '',
    step            INTEGER NOT NULL DEFAULT 0, -- the last step with an event
    total_steps     INTEGER NOT NULL DEFAULT 0,
    trained_tokens  INTEGER NOT NULL DEFAULT 0,
    train_loss      REAL,
    train_accuracy  REAL,
    valid_step      INTEGER NOT NULL DEFAULT 0, -- the last step with an evaluation event
    valid_loss      REAL,
    valid_accuracy  REAL
);
CREATE INDEX jobs_status ON jobs (status, seq);

CREATE TABLE job_events (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    job_id     TEXT    NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL,
    level      TEXT    NOT NULL,
    type       TEXT    NOT NULL,
    message    TEXT    NOT NULL,
    data       TEXT    NOT NULL DEFAULT '' -- JSON object, or empty
);
CREATE INDEX job_events_job ON job_events (job_id, seq);

-- A lease says who runs a job. It is free once expires_at has passed or the row is gone.
CREATE TABLE leases (
    job_id     TEXT    PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    owner      TEXT    NOT NULL,
    attempt    INTEGER NOT NULL,
    expires_at INTEGER NOT NULL -- Unix milliseconds
);

CREATE TABLE adapters (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    id          TEXT    NOT NULL UNIQUE,
    name        TEXT    NOT NULL UNIQUE,
    job_id      TEXT    NOT NULL,
    base_model  TEXT    NOT NULL,
    base_digest TEXT    NOT NULL,
    created_at  INTEGER NOT NULL,
    deleted     INTEGER NOT NULL DEFAULT 0 -- 1: hidden, its files are still to be removed
);
