PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE goose_db_version (id INTEGER PRIMARY KEY AUTOINCREMENT, version_id INTEGER NOT NULL, is_applied INTEGER NOT NULL, tstamp TIMESTAMP DEFAULT (datetime('now')));
INSERT INTO goose_db_version VALUES(1,0,1,'2026-01-01 00:00:00');
INSERT INTO goose_db_version VALUES(2,1,1,'2026-01-01 00:00:00');
INSERT INTO goose_db_version VALUES(3,2,1,'2026-01-01 00:00:00');
INSERT INTO goose_db_version VALUES(4,3,1,'2026-01-01 00:00:00');
CREATE TABLE files (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    filename   TEXT    NOT NULL,
    purpose    TEXT    NOT NULL,
    bytes      INTEGER NOT NULL,
    sha256     TEXT    NOT NULL
, expires_at INTEGER NOT NULL DEFAULT 0);
INSERT INTO files VALUES(1,'file-train',1760000000,'数据.jsonl','fine-tune',15,'5e4ce7b36ba37b78a5d5f9fd08e6b7b54ba6879d651aa46ec9e1d6fa24ebe30a',0);
INSERT INTO files VALUES(2,'file-result',1760000100,'step_metrics.csv','fine-tune-results',7,'3270cca061427b1a27f5d8eedac358d7723e4a2c02ca7adbb89449614a5fef82',0);
INSERT INTO files VALUES(3,'file-brief',1760000200,'in.jsonl','batch',15,'5e4ce7b36ba37b78a5d5f9fd08e6b7b54ba6879d651aa46ec9e1d6fa24ebe30a',4102444800);
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
, start_adapter TEXT NOT NULL DEFAULT '', checkpoint_step INTEGER NOT NULL DEFAULT 0, valid_choice_accuracy REAL);
INSERT INTO jobs VALUES(1,'ftjob-done',1760000010,1760000100,'succeeded',2,0,4,'SmolLM2-135M-Instruct','5a1395716f7913741cc51d98581b9b1228d80987a9f7d3664106742eb06bba83','file-train','file-train','quiz',42,'supervised','abcdefgh','ft:SmolLM2-135M-Instruct:local:quiz:abcdefgh','{"n_epochs":2}','{"lora_r":8}','{"team":"a"}','{"batch_size":4,"num_train_epochs":2,"total_steps":6}','["file-result"]','ft:SmolLM2-135M-Instruct:local:quiz:abcdefgh','','','',6,6,1234,1.25,0.5,6,1.5,0.25,'',4,0.75);
INSERT INTO jobs VALUES(2,'ftjob-runs',1760000020,0,'running',1,1,2,'SmolLM2-135M-Instruct','5a1395716f7913741cc51d98581b9b1228d80987a9f7d3664106742eb06bba83','file-train','','',7,'dpo','ijklmnop','ft:SmolLM2-135M-Instruct:local::ijklmnop','{}','{}','{}','','[]','','','','',3,10,99,NULL,NULL,0,NULL,NULL,'ft:SmolLM2-135M-Instruct:local:quiz:abcdefgh',2,NULL);
INSERT INTO jobs VALUES(3,'ftjob-bad',1760000030,1760000031,'failed',0,0,0,'SmolLM2-135M-Instruct','5a1395716f7913741cc51d98581b9b1228d80987a9f7d3664106742eb06bba83','file-train','','',7,'supervised','qrstuvwx','ft:SmolLM2-135M-Instruct:local::qrstuvwx','{}','{}','{}','','[]','','invalid_training_file','line 1: expected messages','training_file',0,0,0,NULL,NULL,0,NULL,NULL,'',0,NULL);
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
INSERT INTO job_events VALUES(1,'ftevent-1','ftjob-done',1760000010,'info','message','Created fine-tuning job: ftjob-done','');
INSERT INTO job_events VALUES(2,'ftevent-2','ftjob-done',1760000050,'info','metrics','Step 6/6: training loss=1.25','{"step":6,"total_steps":6,"train_loss":1.25}');
CREATE TABLE leases (
    job_id     TEXT    PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    owner      TEXT    NOT NULL,
    attempt    INTEGER NOT NULL,
    expires_at INTEGER NOT NULL -- Unix milliseconds
);
INSERT INTO leases VALUES('ftjob-runs','aaaabbbbccccdddd',1,1760000040000);
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
INSERT INTO adapters VALUES(1,'abcdefgh','ft:SmolLM2-135M-Instruct:local:quiz:abcdefgh','ftjob-done','SmolLM2-135M-Instruct','5a1395716f7913741cc51d98581b9b1228d80987a9f7d3664106742eb06bba83',1760000100,0);
INSERT INTO adapters VALUES(2,'gonegone','ft:SmolLM2-135M-Instruct:local::gonegone','ftjob-old','SmolLM2-135M-Instruct','5a1395716f7913741cc51d98581b9b1228d80987a9f7d3664106742eb06bba83',1750000100,1);
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
INSERT INTO uploads VALUES(1,'upload_done',1760000200,1760003800,'completed','in.jsonl','batch','text/jsonl',15,3600,'file-brief');
INSERT INTO uploads VALUES(2,'upload_open',1760000200,4102444800,'pending','big.jsonl','fine-tune','text/jsonl',1000,0,'');
CREATE TABLE upload_parts (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT    NOT NULL UNIQUE,
    upload_id  TEXT    NOT NULL REFERENCES uploads (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL,
    bytes      INTEGER NOT NULL,
    sha256     TEXT    NOT NULL
);
INSERT INTO upload_parts VALUES(1,'part_1','upload_open',1760000210,15,'5e4ce7b36ba37b78a5d5f9fd08e6b7b54ba6879d651aa46ec9e1d6fa24ebe30a');
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
INSERT INTO batches VALUES(1,'batch_1',1760000220,'in_progress','/v1/chat/completions','file-brief','24h','{"team":"a"}',0,'','','','',2,1,0,'{}',1760000221,4102444800,0,0,0,0,0,0);
CREATE TABLE batch_answers (
    batch_id TEXT    NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
    line     INTEGER NOT NULL, -- of the request in the input file, from 1
    failed   INTEGER NOT NULL, -- 1: belongs into the error file
    content  TEXT    NOT NULL, -- one line of JSON
    PRIMARY KEY (batch_id, line)
) WITHOUT ROWID;
INSERT INTO batch_answers VALUES('batch_1',1,0,'{"id":"batch_req_1","custom_id":"a"}');
DELETE FROM sqlite_sequence;
INSERT INTO sqlite_sequence VALUES('goose_db_version',4);
INSERT INTO sqlite_sequence VALUES('files',3);
INSERT INTO sqlite_sequence VALUES('jobs',3);
INSERT INTO sqlite_sequence VALUES('job_events',2);
INSERT INTO sqlite_sequence VALUES('adapters',2);
INSERT INTO sqlite_sequence VALUES('uploads',2);
INSERT INTO sqlite_sequence VALUES('upload_parts',1);
INSERT INTO sqlite_sequence VALUES('batches',1);
CREATE INDEX files_sha256 ON files (sha256);
CREATE INDEX jobs_status ON jobs (status, seq);
CREATE INDEX job_events_job ON job_events (job_id, seq);
CREATE INDEX files_expires_at ON files (expires_at) WHERE expires_at > 0;
CREATE INDEX uploads_status ON uploads (status, expires_at);
CREATE INDEX upload_parts_upload ON upload_parts (upload_id);
CREATE INDEX upload_parts_sha256 ON upload_parts (sha256);
CREATE INDEX batches_status ON batches (status, seq);
COMMIT;
