package server

import (
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/gin-gonic/gin"

	"github.com/hone-llm/hone/adapters"
	"github.com/hone-llm/hone/internal/wire"
)

// OpenAI's projects share checkpoints by permissions. hone has one project, which may use every model, so each checkpoint has
// one permission, that can be neither added to nor taken away.

// project is the one that hone has.
const project = "proj_local"

// permission returns the permission of the checkpoint that the path names.
func (s *Server) permission(c *gin.Context) (wire.CheckpointPermission, error) {
	name := c.Param("checkpoint")
	a, err := s.adapters.Lookup(name)
	if errors.Is(err, adapters.ErrNotFound) || err == nil && !strings.Contains(name, ":ckpt-step-") {
		return wire.CheckpointPermission{}, &wire.Error{Status: http.StatusNotFound, Type: wire.ErrorTypeInvalidRequest, Param: new("checkpoint"), Code: new("not_found"),
			Message: fmt.Sprintf("the checkpoint %q does not exist; GET /v1/fine_tuning/jobs/{id}/checkpoints lists those of a job", name)}
	}
	if err != nil {
		return wire.CheckpointPermission{}, err
	}
	return wire.CheckpointPermission{ID: "cp_" + a.ID, Object: "checkpoint.permission", CreatedAt: a.CreatedAt, ProjectID: project}, nil
}

func (s *Server) listPermissions(c *gin.Context) error {
	if _, err := limitOf(c, 10, 1000); err != nil {
		return err
	}
	if order := c.DefaultQuery("order", "descending"); order != "ascending" && order != "descending" {
		return invalid("order", "order is %q, expected ascending or descending", order)
	}
	p, err := s.permission(c)
	if err != nil {
		return err
	}
	list := []wire.CheckpointPermission{p}
	after := c.Query("after")
	if after != "" && after != p.ID {
		return invalid("after", "after is %q, which is not in the list", after)
	}
	if only := c.Query("project_id"); after != "" || only != "" && only != project {
		list = list[:0]
	}
	return encodePermissions(c, list)
}

func (s *Server) createPermission(c *gin.Context) error {
	p, err := s.permission(c)
	if err != nil {
		return err
	}
	var req wire.CheckpointPermissionRequest
	if err := decode(c, &req); err != nil {
		return err
	}
	if len(req.ProjectIDs) == 0 {
		return invalid("project_ids", "project_ids is empty; expected %q", project)
	}
	for i, id := range req.ProjectIDs {
		if id != project {
			return invalid(fmt.Sprintf("project_ids[%d]", i), "the project %.60q does not exist: hone has one, %s, which may use every checkpoint", id, project)
		}
	}
	return encodePermissions(c, []wire.CheckpointPermission{p})
}

func encodePermissions(c *gin.Context, list []wire.CheckpointPermission) error {
	return encode(c, http.StatusOK, page(list, false, func(p wire.CheckpointPermission) string { return p.ID }))
}

func (s *Server) deletePermission(c *gin.Context) error {
	p, err := s.permission(c)
	if err != nil {
		return err
	}
	if id := c.Param("permission"); id != p.ID {
		return &wire.Error{Status: http.StatusNotFound, Type: wire.ErrorTypeInvalidRequest, Param: new("permission"), Code: new("not_found"),
			Message: fmt.Sprintf("the permission %q does not exist; the checkpoint has %s", id, p.ID)}
	}
	return &wire.Error{Status: http.StatusConflict, Type: wire.ErrorTypeInvalidRequest, Param: new("permission"), Code: new("conflict"),
		Message: fmt.Sprintf("the permission of hone's only project stays; DELETE /v1/models/%s removes the checkpoint", c.Param("checkpoint"))}
}
