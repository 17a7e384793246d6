package drill

import (
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-backup/holdfast/internal/discover"
)

// TestScratchVariables: what talks to others, or names a place, is left out; secrets and ids are not.
func TestScratchVariables(t *testing.T) {
	for name, used := range map[string]bool{
		"OC_JWT_SECRET": true, "OCIS_TRANSFER_SECRET": true, "OCIS_MACHINE_AUTH_API_KEY": true, "OC_SYSTEM_USER_ID": true, "OC_SYSTEM_USER_API_KEY": true,
		"OC_ADMIN_USER_ID": true, "STORAGE_USERS_MOUNT_ID": true, "GATEWAY_STORAGE_USERS_MOUNT_ID": true, "GRAPH_APPLICATION_ID": true,
		"OC_SERVICE_ACCOUNT_ID": true, "OC_SERVICE_ACCOUNT_SECRET": true, "SETTINGS_SERVICE_ACCOUNT_IDS": true,
		"IDM_REVASVC_PASSWORD": true, "OCIS_LDAP_BIND_PASSWORD": true, "USERS_LDAP_BIND_DN": true, "OC_LDAP_USER_SCHEMA_ID": true,
		"STORAGE_USERS_POSIX_PERSONAL_SPACE_PATH_TEMPLATE": true, "STORAGE_USERS_OCIS_PROPAGATOR": true, "OC_SPACES_MAX_QUOTA": true,
		"STORAGE_USERS_POSIX_USE_SPACE_GROUPS": true, "OC_DISABLE_VERSIONING": true, "AUTH_APP_ENABLE_IMPERSONATION": true,

		"LD_PRELOAD": false, "GODEBUG": false, "PATH": false, "OC_URL": false, "OCIS_OIDC_ISSUER": false, "PROXY_OIDC_REWRITE_WELLKNOWN": false, "OC_LDAP_URI": false, "PROXY_AUTOPROVISION_ACCOUNTS": false,
		"NOTIFICATIONS_SMTP_HOST": false, "OC_EVENTS_ENDPOINT": false, "OCIS_CACHE_STORE": false,
		"OC_PERSISTENT_STORE_NODES": false, "OC_CACHE_STORE_NODES": false, "OC_TRACING_COLLECTOR": false, "OC_TRACING_ENDPOINT": false,
		"OC_ENABLE_OCM": false, "OCM_MESH_DIRECTORY_URL": false, "STORAGE_USERS_S3NG_ENDPOINT": false, "STORAGE_USERS_DECOMPOSEDS3_SECRET_KEY": false,
		"GRAPH_KEYCLOAK_CLIENT_SECRET": false, "NATS_NATS_HOST": false, "POSTPROCESSING_STEPS": false, "FRONTEND_APP_HANDLER_SECURE_VIEW_APP_ADDR": false,
		"OC_BASE_DATA_PATH": false, "OCIS_CONFIG_DIR": false, "STORAGE_USERS_POSIX_ROOT": false, "IDM_DATABASE_PATH": false, "IDM_LDAPS_CERT": false,
		"OC_LDAP_CACERT": false, "PROXY_TRANSPORT_TLS_KEY": false, "PROXY_HTTP_ADDR": false, "OC_RUN_SERVICES": false, "OC_ADD_RUN_SERVICES": false,
		"OC_REVA_GATEWAY": false, "OC_LOG_FILE": false, "PROXY_ROLE_ASSIGNMENT_DRIVER": false, "STORAGE_USERS_POSIX_WATCH_PATH": false, "OC_GRPC_CLIENT_TLS_MODE": false,
		"USERS_OWNCLOUDSQL_DB_PASSWORD": false, "STORAGE_SYSTEM_OCIS_ROOT": false, "WEB_UI_CONFIG_FILE": false, "PROXY_PRESIGNEDURL_SIGNING_KEYS_STORE": false,
	} {
		env, left := scratchVariables([]discover.Var{{Name: name, Value: "v=w"}})
		if used && (len(left) > 0 || !slices.Equal(env, []string{name + "=v=w"})) || !used && (len(env) > 0 || strings.Join(left, "") != name) {
			t.Errorf("%s: used %q, left out %q", name, env, left)
		}
	}
}
