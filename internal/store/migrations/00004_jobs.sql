-- +goose Up
-- Jobs that wait although they could run, and what they have used.
ALTER TABLE jobs ADD COLUMN paused TEXT NOT NULL DEFAULT ''; -- why: requested, disk_full; '' if the job may run
ALTER TABLE jobs ADD COLUMN disk_bytes INTEGER NOT NULL DEFAULT 0; -- that have to be free before its next attempt
ALTER TABLE jobs ADD COLUMN run_seconds REAL NOT NULL DEFAULT 0; -- of all its attempts
