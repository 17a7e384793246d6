package drill

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/holdfast-backup/holdfast/internal/browse"
	"github.com/holdfast-backup/holdfast/internal/discover"
	"github.com/holdfast-backup/holdfast/internal/ocis"
	"github.com/holdfast-backup/holdfast/internal/repo"
	"github.com/holdfast-backup/holdfast/internal/snapshot"
)

// VariablesReport tells what the server got of the variables that configured the instance.
type VariablesReport struct {
	Used int `json:"used"`
	// LeftOut names those that would have the server talk to others, or look elsewhere than in the
	// scratch directory.
	LeftOut []string `json:"left_out"`
}

// What a server in a drill does without. A word stands between underscores.
var (
	// Ids are needed whatever else is in their names, and so are the patterns by which the driver names
	// its folders.
	always = regexp.MustCompile(`_MOUNT_ID$|_(PATH|ALIAS)_TEMPLATE$`)
	// Services that do not run in a drill, or that it gives everything they need.
	services = regexp.MustCompile(`^(ACTIVITYLOG|ANTIVIRUS|APP_PROVIDER|APP_REGISTRY|AUDIT|CLIENTLOG|COLLABORATION|IDP|INVITATIONS|NATS|` +
		`NOTIFICATIONS|OCM|OCS|POLICIES|POSTPROCESSING|SEARCH|SSE|STORE|THUMBNAILS|USERLOG|WEB|WEBDAV|WEBFINGER)_`)
	// Addresses, what is kept outside, identity providers, mail, federation, buckets, traces.
	outward = regexp.MustCompile(`_(ADDR|ADDRESS|AUTOPROVISION|CACHE|CLUSTER|CORS|DEBUG|ENDPOINTS?|EVENTS|GRPC|HOST|HTTPS?|ISSUER|KEYCLOAK|LOG|` +
		`NODES|OCM|OIDC|OWNCLOUDSQL|PORT|REGISTRY|REVA|ROLE_ASSIGNMENT|RUNTIME|S3NG|DECOMPOSEDS3|SMTP|SOCKET|STORE|TRACING|URI|URL|WATCH|WOPI)(_|$)`)
	// Places, and which services run.
	elsewhere = regexp.MustCompile(`_(CA|CACERT|CERT|CERTS|DATABASE|DATADIR|DIR|EXTENSIONS|FILES?|LOCATION|PATH|ROOT|SERVICES|TLS)(_|$)|_TLS_KEY$|_LDAPS_KEY$`)
)

// scratchVariables takes of an instance's variables what the server needs to read its data: ids, secrets
// of its own, and how it is to behave. What is not the product's own is not believed to be so.
func scratchVariables(vars []discover.Var) (env []string, left []string) {
	for _, v := range vars {
		if !ocis.IsVariable(v.Name) || !always.MatchString(v.Name) && (services.MatchString(v.Name) || outward.MatchString(v.Name) || elsewhere.MatchString(v.Name)) {
			left = append(left, v.Name)
			continue
		}
		env = append(env, v.Name+"="+v.Value)
	}
	slices.Sort(left)
	return env, slices.Compact(left)
}

// variablesLimit bounds the file, in bytes.
const variablesLimit = 16 << 20

// variables reads what configured the instance from outside.
func (p *places) variables(ctx context.Context, r *repo.Repository, view *browse.View) ([]string, *VariablesReport, error) {
	n, err := view.Find(ctx, "/config/environment/"+discover.EffectiveFile)
	if errors.Is(err, snapshot.ErrNoSuchPath) {
		return nil, nil, nil // it was configured by its files alone
	}
	var data []byte
	if err == nil {
		data, err = snapshot.LoadContent(ctx, r, n, variablesLimit)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("the variables that configured the instance: %w", err)
	}
	vars, _ := discover.ParseEnvFile(data, nil)
	env, left := scratchVariables(vars)
	env = slices.DeleteFunc(env, func(kv string) bool { return strings.ContainsRune(kv, 0) }) // no process can have it
	return env, &VariablesReport{len(env), append([]string{}, left...)}, nil
}
