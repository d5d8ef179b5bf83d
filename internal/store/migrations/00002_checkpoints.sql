-- +goose Up
ALTER TABLE jobs ADD COLUMN start_adapter TEXT NOT NULL DEFAULT ''; -- name of the adapter that training goes on from
ALTER TABLE jobs ADD COLUMN checkpoint_step INTEGER NOT NULL DEFAULT 0; -- of the newest checkpoint that was taken up
ALTER TABLE jobs ADD COLUMN valid_choice_accuracy REAL;
