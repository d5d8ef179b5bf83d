package server

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/hone-llm/hone/finetune"
)

// hyperparameterNames are OpenAI's; beta is of dpo. batch_size, learning_rate_multiplier and beta are options of `hone` too.
var hyperparameterNames = []string{"batch_size", "beta", "learning_rate_multiplier", "n_epochs"}

// hyperparameterPlaces are the paths of the objects that hold them, each with a dot at its end.
var hyperparameterPlaces = []string{"hyperparameters.", "method.supervised.hyperparameters.", "method.dpo.hyperparameters."}

// refuseMisplaced refuses a job's request in which something that changes the training stands where it would be left out
// of account: an option beside `hone`, a hyper-parameter beside its object, an unknown one within it.
func refuseMisplaced(fields map[string]json.RawMessage) error { return refuseMisplacedIn("", fields) }

// refuseMisplacedIn looks at the fields of the object whose path, with a dot at its end, is prefix.
func refuseMisplacedIn(prefix string, fields map[string]json.RawMessage) error {
	hyperparameters := slices.Contains(hyperparameterPlaces, prefix)
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		path := prefix + key
		switch {
		case isNull(fields[key]):
			continue
		case hyperparameters && slices.Contains(hyperparameterNames, key) && (key != "beta" || prefix == "method.dpo.hyperparameters."):
			continue
		case slices.Contains(hyperparameterNames, key), finetune.IsOption(key):
			return misplaced(path, key)
		case hyperparameters:
			return invalid(path, "%s is not a hyper-parameter; they are %s, and other options stand in the object hone",
				path, strings.Join(hyperparameterNames, ", "))
		case path == "method.hyperparameters":
			return invalid(path, "%s would be left out of account; its place is method.supervised.hyperparameters or method.dpo.hyperparameters", path)
		case path == "hyperparameters", path == "method", path == "method.supervised", path == "method.dpo", slices.Contains(hyperparameterPlaces, path+"."):
			var inner map[string]json.RawMessage
			if json.Unmarshal(fields[key], &inner) != nil {
				continue // decode says what is wrong with it
			}
			if err := refuseMisplacedIn(path+".", inner); err != nil {
				return err
			}
		}
	}
	return nil
}

// misplaced says where the option or hyper-parameter called name, which stands at path, belongs.
func misplaced(path, name string) error {
	place := "hone"
	if slices.Contains(hyperparameterNames, name) {
		place = "method.supervised.hyperparameters"
		if name == "beta" || strings.HasPrefix(path, "method.dpo.") {
			place = "method.dpo.hyperparameters"
		}
	}
	return invalid(path, "%s would be left out of account; its place is %s.%s", path, place, name)
}
