package ocis

import "strings"

// variables are the beginnings of the product's environment variables: its global ones, and those of its
// services, old and new.
var variables = []string{
	"OCIS_", "OC_", "ACCOUNTS_", "ACTIVITYLOG_", "ANTIVIRUS_", "APP_PROVIDER_", "APP_REGISTRY_", "AUDIT_", "AUTH_", "CLIENTLOG_",
	"COLLABORATION_", "EVENTHISTORY_", "FRONTEND_", "GATEWAY_", "GRAPH_", "GROUPS_", "IDM_", "IDP_", "INVITATIONS_", "LDAP_", "NATS_",
	"NOTIFICATIONS_", "OCDAV_", "OCM_", "OCS_", "POLICIES_", "POSTPROCESSING_", "PROXY_", "REVA_", "SEARCH_", "SETTINGS_", "SHARING_",
	"SSE_", "STORAGE_", "STORE_", "THUMBNAILS_", "USERLOG_", "USERS_", "WEB_", "WEBDAV_", "WEBFINGER_",
}

// IsVariable tells by its name whether an environment variable is one of the product's.
func IsVariable(name string) bool {
	for _, v := range variables {
		if strings.HasPrefix(name, v) {
			return true
		}
	}
	return false
}
